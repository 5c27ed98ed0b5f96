"""What a run trains on from its first step to its last: smaller pictures first, if it has stages."""

from bisect import bisect_right
from dataclasses import replace
from typing import Any

from config import StageConfig, TrainConfig
from localdit.data.labelled_images import Split
from train.data import Condition, Source
from train.datasets import build_dataset
from train.mixture import MixedSource
from train.precomputed import load_manifest


class StagedSource(Source):
    """One source after another, each from its micro-step on.

    Args:
        sources: as many as there are stages, of the same pictures in other sizes.
        starts: first micro-step of each; the first is 0.
        batch_sizes: pictures per process and micro-step of each.
    """

    def __init__(self, sources: list[Source], starts: list[int], batch_sizes: list[int]):
        self.sources = sources
        self.starts = starts
        self.batch_sizes = batch_sizes
        self.channels, self.classes, self.seed = sources[-1].channels, sources[-1].classes, sources[-1].seed
        self.empty_text = sources[-1].empty_text
        self.sizes = [size for source in reversed(sources) for size in source.sizes]  # the last stage's first

    def words(self) -> list[str]:
        return self.sources[-1].words()

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Any]:
        """As of the source whose turn it is; its batch size counts, and not the one given."""
        stage = bisect_right(self.starts, micro_step) - 1
        keys = self.sources[stage].keys(micro_step, self.batch_sizes[stage], rank, world_size)
        return [(stage, key) for key in keys]

    def __getitem__(self, key: tuple[int, Any]) -> dict:
        stage, inner = key
        return self.sources[stage][inner]


def build_source(config: TrainConfig, condition: Condition | None, split: Split = "train") -> Source:
    """What a run trains on: its data, mixed with others if there are any, after the smaller ones of its stages.

    With "test", what it is validated with, of the last size.

    Raises:
        ValueError: where the stages do not follow each other before the last step, or the sources are not alike.
    """
    ends = [stage.until_step for stage in config.stages]
    if ends != sorted(set(ends)) or (ends and ends[-1] >= config.max_steps):
        raise ValueError(
            f"stages end at the steps {ends}; let them ascend, and end before max_steps={config.max_steps}."
        )
    ready = [data.name == "precomputed" for data in (config.data, *config.mixture)]
    if any(ready) and not all(ready):
        raise ValueError("mixture holds precomputed data beside pictures; precompute all of it, or none.")
    check_paths(config, precomputed=any(ready))
    last = mixed(config, condition, split)
    if not config.stages or split == "test":
        return last
    before = [mixed(config, condition, split, stage) for stage in config.stages]
    sizes = [stage.batch_size or config.batch_size for stage in config.stages]
    starts = [0, *(end * config.gradient_accumulation_steps for end in ends)]
    return StagedSource([*before, last], starts, [*sizes, config.batch_size])


def check_paths(config: TrainConfig, precomputed: bool) -> None:
    """Raise a ValueError where stages do not have the folders of precomputed data that they need, or need none."""
    if config.stages and precomputed and config.mixture:
        raise ValueError("stages of precomputed data cannot be mixed; leave mixture out, or train on the pictures.")
    for number, stage in enumerate(config.stages):
        if (stage.path is not None) != precomputed:
            rule = "precompute its pictures, and name the folder" if precomputed else "it is for precomputed data alone"
            raise ValueError(f"stages.{number}.path={stage.path!r}, with data.name={config.data.name}; {rule}.")
        if stage.path is not None and (found := load_manifest(stage.path)["data"]["resolution"]) != stage.resolution:
            raise ValueError(
                f"stages.{number}.resolution={stage.resolution}, but {stage.path} has pictures of {found}; make them "
                "equal."
            )


def mixed(config: TrainConfig, condition: Condition | None, split: Split, stage: StageConfig | None = None) -> Source:
    """The run's data and mixture, all as a stage has them if one is given."""
    parts = (config.data, *config.mixture)
    if stage is not None:
        parts = tuple(replace(part, resolution=stage.resolution, path=stage.path or part.path) for part in parts)
    sources = [build_dataset(part, config.seed, condition, split) for part in parts]
    return sources[0] if len(sources) == 1 else MixedSource(sources, [part.weight for part in parts], config.seed)
