"""What a checkpoint rests on beside its settings: how many pictures there were, and how the words were numbered."""

import hashlib
import json
import logging
from typing import Any

from config import TrainConfig
from train.components import Networks
from train.data import Source

logger = logging.getLogger(__name__)


def fingerprint(config: TrainConfig, networks: Networks, source: Source) -> dict[str, Any]:
    """The number of pictures of each source, None of an endless one; and a hash of the words, where they are new."""
    words = None
    if networks.tokenizer is not None and config.pretrained is None and config.text_encoder.pretrained is None:
        vocabulary = json.dumps(networks.tokenizer.get_vocab(), sort_keys=True)
        words = hashlib.sha256(vocabulary.encode()).hexdigest()
    return {"pictures": count(source), "words": words}


def count(source: Source) -> Any:
    """Pictures of a source, or of each of its sources."""
    if hasattr(source, "sources"):
        return [count(each) for each in source.sources]
    members = getattr(source, "members", None)
    return None if members is None else sum(len(rows) for rows in members.values())


def check_fingerprint(before: dict[str, Any] | None, now: dict[str, Any], checkpoint: str) -> None:
    """Raise a ValueError where words are numbered otherwise than in a checkpoint; tell of more or fewer pictures."""
    if before is None:  # of a version that kept none
        return
    if before["words"] != now["words"]:
        raise ValueError(
            f"The captions have other words than those that {checkpoint} has learned, so that its text encoder would "
            "take one for another; bring the captions back, or start anew with pretrained set to a pipeline."
        )
    if before["pictures"] != now["pictures"]:
        logger.warning(
            "There are %s pictures, and were %s when %s was written; their order is another one from here on.",
            *(now["pictures"], before["pictures"], checkpoint),
        )
