"""Data sets that are read as they come, without being on this machine: of the Hub, by the package datasets."""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from config import DataConfig
from localdit.data.labelled_images import Split
from train.data import Condition, Source
from train.pictures import TRIED, reason, to_tensor, upright_pixels
from train.records import caption_of, load_hub_rows, open_encoded

Key = tuple[int, int, int]  # process, number of processes, and position in what the process reads


class StreamSource(Source):
    """A data set in the order of its stream, shuffled in a buffer and split among the processes, epoch after epoch.

    The order depends on the seed, the epoch and the process alone. A key further on is reached by reading on: so does a
    run that is resumed, and so does each of several workers, who all read everything. A picture that cannot be read is
    replaced by the next one, and told of in "unreadable".

    Raises:
        ValueError: where the settings need to know all pictures beforehand.
    """

    def __init__(self, config: DataConfig, seed: int, condition: Condition | None, split: Split = "train"):
        super().__init__(config.resolution, seed)
        for name in ("bucket_multiple", "scan", "held_out"):
            if getattr(config, name):
                raise ValueError(
                    f"data.{name}={getattr(config, name)!r} needs to know all pictures beforehand, which a stream does "
                    "not; leave it out, or set data.streaming to false."
                )
        if split == "test":
            raise ValueError("A stream holds no picture out to validate with; set validate_every to 0.")
        self.config, self.condition = config, condition
        self.rows, self.classes = load_hub_rows(config, condition)
        self.rows = self.rows.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        self.reader: Iterator[dict] | None = None
        self.ahead: deque[dict] = deque()  # rows that were read already
        self.place: Key = (0, 1, 0)  # of the first of them, or of the next to be read

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reader": None, "ahead": deque()}  # a worker has its own

    def words(self) -> list[str]:
        raise ValueError(
            "A text encoder of new words needs all captions beforehand, which a stream does not know; name one by "
            "text_encoder.pretrained, or set data.streaming to false."
        )

    def every(self, count: int | None) -> dict[int, list[Key]]:
        positions = super().every(count)[0]
        return {0: [(0, 1, position) for position in positions]}

    def keys(self, micro_step: int, batch_size: int, rank: int, world_size: int) -> list[Key]:
        start = micro_step * batch_size
        return [(rank, world_size, position) for position in range(start, start + batch_size)]

    def __getitem__(self, key: Key) -> dict:
        """The picture of a key, or the next one of its process that can be read."""
        self._go_to(key)
        unreadable: list[str] = []
        for offset in range(TRIED):
            row, name = self._ahead(offset), f"{self.config.path} (of process {key[0]})[{key[2] + offset}]"
            try:
                return {"name": name, **self._item(row), "unreadable": "\n".join(unreadable)}
            except Exception as error:  # damaged bytes make a decoder fail in any way
                unreadable.append(f"{name}: {reason(error)}")
        raise ValueError(f"None of {TRIED} pictures in a row can be read; the first is {unreadable[0]}.")

    def _item(self, row: dict) -> dict:
        """The picture of a row, with what the model is conditioned on."""
        with open_encoded(row[self.config.image_column]) as image:
            item: dict = {"image": to_tensor(upright_pixels(image, *self.sizes[0]))}
        if self.condition == "label":
            item["label"] = int(row[self.config.label_column])
        if self.condition == "caption":
            item["caption"] = caption_of(row, self.config.caption_column)
        return item

    def _go_to(self, key: Key) -> None:
        """Let the next row that is read, or read ahead, be that of a key."""
        rank, world_size, position = key
        if self.reader is None or self.place[:2] != (rank, world_size) or self.place[2] > position:
            self.reader, self.ahead, self.place = self._read(rank, world_size), deque(), (rank, world_size, 0)
        for _ in range(position - self.place[2]):
            self._ahead(0)
            self.ahead.popleft()
        self.place = key

    def _ahead(self, offset: int) -> dict:
        """The row so many after the place."""
        while self.reader is not None and len(self.ahead) <= offset:
            self.ahead.append(next(self.reader))
        return self.ahead[offset]

    def _read(self, rank: int, world_size: int) -> Iterator[dict]:
        """One process's rows, epoch after epoch."""
        from datasets.distributed import split_dataset_by_node  # pyright: ignore[reportMissingImports]

        rows = split_dataset_by_node(self.rows, rank, world_size)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            empty = True
            for batch in rows.iter(batch_size=1):  # plain iteration would split the rows among the loader's workers
                empty = False
                yield {column: values[0] for column, values in batch.items()}
            if empty:
                raise ValueError(f"data.path={self.config.path!r} has no row for process {rank} of {world_size}.")
