"""Pushing to the Hub while the training goes on: in a thread, and never so that a failure stops the run."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class BackgroundPush:
    """Pushes pipelines, with their code and card, to one repository, one after the other.

    Args:
        repo_id: "owner/name"; made if it does not exist.
        private: whether a new repository is private.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id = repo_id
        self.private = private
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None and not self._running.done()

    def start(self, pipeline: DiffusionPipeline, message: str) -> None:
        """Push a pipeline that nobody else will change; returns at once."""
        self._running = self._pool.submit(self._push, pipeline, message)

    def _push(self, pipeline: DiffusionPipeline, message: str) -> None:
        try:
            url = pipeline.push_to_hub(self.repo_id, private=self.private, commit_message=message)
            logger.info("Pushed to %s.", url)
        except Exception as error:  # no failure of the network or the Hub may end a run
            logger.warning("%s was not pushed to %s (%s); the training goes on.", message, self.repo_id, error)

    def finish(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()
