"""Pictures that could not be read: told of once each, and not too many of them."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

REPORT = "unreadable.jsonl"


class UnreadablePictures:
    """Counts them over the whole run, resumed or not, in a file of the run's folder."""

    def __init__(self, folder: Path, limit: int):
        self.file = folder / REPORT
        self.limit = limit
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.known = {json.loads(line)["picture"] for line in lines}

    def note(self, told: list[str]) -> None:
        """Take the "unreadable" of a batch: "name: reason", one a line, or nothing.

        Raises:
            ValueError: where there are now more than the limit.
        """
        for line in "\n".join(told).split("\n"):
            picture = line.partition(": ")[0]
            if not line or picture in self.known:
                continue
            self.known.add(picture)
            logger.warning("A picture cannot be read and is passed over: %s.", line)
            with self.file.open("a") as file:
                file.write(json.dumps({"picture": picture, "reason": line.partition(": ")[2]}) + "\n")
        if len(self.known) > self.limit:
            raise ValueError(
                f"{len(self.known)} pictures cannot be read, more than data.max_unreadable={self.limit}; repair or "
                f"remove those that {self.file} names, or raise the limit."
            )
