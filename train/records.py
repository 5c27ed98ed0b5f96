"""Where pictures lie: folders, data sets of the Hugging Face Hub, tar shards; all are rows to be read in any order."""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from config import DataConfig
from train.data import Condition
from train.pictures import Records

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as in shard-{000..127}.tar


def load_records(config: DataConfig, condition: Condition | None) -> Records:
    """The pictures that the config names, with what the model is conditioned on.

    Raises:
        ValueError: where there are none, or they have no such condition.
    """
    if config.path is None:
        raise ValueError(f"data.path is not set; say where the pictures of data.name={config.name!r} are.")
    return RECORDS[config.name](config, condition)


class FolderRecords:
    """Pictures of a folder at any depth.

    Captions come from .txt files or metadata.jsonl, classes from the names of the folders.
    """

    def __init__(self, config: DataConfig, condition: Condition | None):
        root = Path(str(config.path))
        if not root.is_dir():
            raise ValueError(f"data.path={config.path!r} is not a folder; give the folder of your pictures.")
        self.root, self.files = root, sorted(filter(is_picture, visible_files(root)))
        if not self.files:
            raise ValueError(f"{root} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}); check data.path.")
        self.classes = folder_classes(root, self.files) if condition == "label" else None
        self.captions = read_captions(root, self.files) if condition == "caption" else None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        return str(self.files[row])

    def open(self, row: int) -> Image.Image:
        return Image.open(self.files[row])

    def caption(self, row: int) -> str:
        file = self.files[row]
        caption = self.captions[row] if self.captions is not None else find_caption(file, self.metadata)
        if caption is None:
            raise ValueError("it has no caption")
        return caption

    @cached_property
    def metadata(self) -> dict[Path, str]:
        return read_metadata(self.root)

    def label(self, row: int) -> int:
        return (self.classes or []).index(self.files[row].parent.name)


def visible_files(root: Path) -> Iterator[Path]:
    """Everything at any depth, but for hidden files and folders, such as those that other systems leave."""
    return (path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts))


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def folder_classes(root: Path, files: list[Path]) -> list[str]:
    """The names of the folders that the pictures lie in; raises a ValueError where some lie beside those folders."""
    beside = [path for path in files if path.parent == root]
    if beside and len(beside) < len(files):
        raise ValueError(
            f"{beside[0]} and {len(beside) - 1} other picture(s) lie beside the folders of the classes; "
            "move them into one of these, or away."
        )
    return sorted({path.parent.name for path in files})


def read_captions(root: Path, files: list[Path]) -> list[str]:
    """The caption of each file: from the root's metadata.jsonl (file_name, text), or from a .txt of the same name.

    Raises:
        ValueError: where a line of metadata.jsonl cannot be read, or a picture has no caption.
    """
    metadata = read_metadata(root)
    if strangers := sorted(metadata.keys() - set(files)):
        logger.warning(
            "metadata.jsonl names %d file(s) that are no picture here, %s first.", len(strangers), strangers[0]
        )
    captions = {file: find_caption(file, metadata) for file in files}
    if missing := [file for file, caption in captions.items() if caption is None]:
        raise ValueError(
            f"{missing[0]} and {len(missing) - 1} other picture(s) have no caption; put it into a .txt file of the "
            "same name or into metadata.jsonl, or set model.caption_channels to null and train on classes or nothing."
        )
    return [caption for caption in captions.values() if caption is not None]


def find_caption(file: Path, metadata: dict[Path, str]) -> str | None:
    """The caption of a picture's file, if it has one."""
    if file in metadata:
        return metadata[file]
    text = file.with_suffix(".txt")
    return read_text(text).strip() if text.is_file() else None


def read_metadata(root: Path) -> dict[Path, str]:
    """The captions in the root's metadata.jsonl, if it has one; raises a ValueError that names a wrong line."""
    metadata, listing = {}, root / "metadata.jsonl"
    lines = read_text(listing).split("\n") if listing.is_file() else []  # a caption may hold other separators
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry["text"], str):
                raise TypeError("its text is no text")
            metadata[root / entry["file_name"]] = entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'Line {number} of {listing} is not {{"file_name": "...", "text": "..."}}; correct it.'
            ) from error
    return metadata


def read_text(file: Path) -> str:
    """The text of a file, but for a byte order mark; raises a ValueError that names it where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error


class HubRecords:
    """The rows of a data set that `datasets.load_dataset` or `load_from_disk` reads: a Hub id or a folder."""

    def __init__(self, config: DataConfig, condition: Condition | None):
        self.rows, self.classes = load_hub_rows(config, condition)
        self.path, self.config = str(config.path), config
        known = [name for name in (config.caption_column, config.label_column) if name in self.rows.column_names]
        self.conditions = self.rows.select_columns(known) if known else None  # read without the pictures beside them

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return f"{self.path}[{row}]"

    def open(self, row: int) -> Image.Image:
        return open_encoded(self.rows[row][self.config.image_column])

    def caption(self, row: int) -> str:
        return caption_of(self.conditions[row] if self.conditions is not None else {}, self.config.caption_column)

    def label(self, row: int) -> int:
        return int((self.conditions or self.rows)[row][self.config.label_column])


def open_encoded(encoded: dict[str, Any] | None) -> Image.Image:
    """A picture as datasets has it undecoded; raises a ValueError where a row has none."""
    if encoded is None:
        raise ValueError("it has no picture")
    return Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"])


def caption_of(row: dict[str, Any], column: str) -> str:
    """The caption in a row; raises a ValueError where it has none, or no text."""
    if not isinstance(row.get(column), str):
        raise ValueError(f"its {column} is no text but {row.get(column)!r}")
    return row[column]


def load_hub_rows(config: DataConfig, condition: Condition | None) -> tuple[Any, list[str] | None]:
    """The data set of `config.path`, map-style or streamed, with its pictures undecoded; and the names of its classes.

    Raises:
        ValueError: where it cannot be loaded, or is without a column that is needed.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("data.name=huggingface needs the package datasets; pip install datasets.") from error
    path = str(config.path)
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)
            rows = rows[config.split] if isinstance(rows, dict) else rows
            rows = rows.to_iterable_dataset() if config.streaming else rows
        else:
            rows = datasets.load_dataset(path, split=config.split, streaming=config.streaming)
        columns = list(rows.column_names or next(iter(rows)))
    except Exception as error:  # a download fails in many ways, and each is one sentence to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data.path={path!r} cannot be loaded as a data set ({reason}); check it.") from error
    wanted = {"caption": [config.caption_column], "label": [config.label_column]}.get(condition or "", [])
    if missing := sorted({config.image_column, *wanted} - set(columns)):
        raise ValueError(
            f"{path} has no column {missing[0]!r} among {columns}; name yours by data.image_column, "
            "data.caption_column and data.label_column."
        )
    classes = None
    if condition == "label":
        feature = (rows.features or {}).get(config.label_column)
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(f"{path} has no names of classes for data.label_column={config.label_column!r}.")
        classes = list(feature.names)
    # decoded by us, so that a row that cannot be read does not end the run
    return rows.cast_column(config.image_column, datasets.Image(decode=False)), classes


class Part(NamedTuple):
    """A file inside a tar shard."""

    shard: int
    start: int
    size: int


class TarRecords:
    """Samples of tar shards in WebDataset's layout: files of the same stem belong together.

    A picture, a .txt with its caption and a .cls with its label's number. Shards that are not on this machine (any
    address that fsspec opens, such as hf:// or s3://) are copied to `data.cache_dir` first, each once.
    """

    def __init__(self, config: DataConfig, condition: Condition | None):
        self.shards = [local_copy(shard, config.cache_dir) for shard in list_shards(str(config.path))]
        samples: dict[tuple[int, str], dict[str, Part]] = {}  # by shard and stem, as shards may count from 0 each
        for number, shard in enumerate(self.shards):
            for stem, suffix, part in index_tar(shard, number):
                samples.setdefault((number, stem), {})[suffix] = part
        self.names, self.images, self.texts, self.labels = [], [], [], []
        for (_, stem), parts in samples.items():
            image = next((suffix for suffix in parts if suffix in IMAGE_SUFFIXES), None)
            if image is None:
                continue
            self.names.append(f"{self.shards[parts[image].shard]}:{stem}{image}")
            self.images.append(parts[image])
            self.texts.append(parts.get(".txt"))
            self.labels.append(parts.get(".cls"))
        self._check(str(config.path), condition)
        self.classes = None
        if condition == "label":
            self.numbers = [self._number(row) for row in range(len(self.images))]
            self.classes = [str(number) for number in range(max(self.numbers) + 1)]

    def _check(self, path: str, condition: Condition | None) -> None:
        if not self.images:
            raise ValueError(f"{path} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}); check data.path.")
        parts, suffix = {"caption": (self.texts, ".txt"), "label": (self.labels, ".cls")}.get(condition or "", ([], ""))
        if None in parts:
            raise ValueError(f"{self.names[parts.index(None)]} has no {suffix} beside it in its shard; add it.")

    def _number(self, row: int) -> int:
        content = self._bytes(self.labels[row])
        if not content.strip().isdigit():
            raise ValueError(f"The .cls of {self.names[row]} is no number of a class ({content[:20]!r}); correct it.")
        return int(content)

    def _bytes(self, part: Part) -> bytes:
        with self.shards[part.shard].open("rb") as file:
            file.seek(part.start)
            return file.read(part.size)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return self.names[row]

    def open(self, row: int) -> Image.Image:
        return Image.open(io.BytesIO(self._bytes(self.images[row])))

    def caption(self, row: int) -> str:
        if self.texts[row] is None:
            raise ValueError("it has no .txt beside it in its shard")
        return self._bytes(self.texts[row]).decode().strip()

    def label(self, row: int) -> int:
        return self.numbers[row]


def list_shards(path: str) -> list[str]:
    """The shards of a folder, of one file, or of a name with a range such as shard-{000..127}.tar.

    Raises:
        ValueError: where there are none.
    """
    if Path(path).is_dir():
        shards = sorted(str(shard) for shard in Path(path).rglob("*.tar"))
        if not shards:
            raise ValueError(f"{path} holds no .tar file; check data.path.")
        return shards
    braces = BRACES.search(path)
    if braces is None:
        return [path]
    first, last = braces.groups()
    return [
        f"{path[: braces.start()]}{number:0{len(first)}d}{path[braces.end() :]}"
        for number in range(int(first), int(last) + 1)
    ]


def local_copy(shard: str, cache_dir: str | None) -> Path:
    """A shard on this machine: itself, or a copy in the cache.

    Raises:
        ValueError: where it cannot be had.
    """
    if "://" not in shard:
        if not Path(shard).is_file():
            raise ValueError(f"The shard {shard} is no file; check data.path.")
        return Path(shard)
    import fsspec

    folder = cache_dir or str(Path.home() / ".cache" / "localdit" / "shards")
    try:
        return Path(fsspec.open_local(f"filecache::{shard}", filecache={"cache_storage": folder}))  # pyright: ignore
    except Exception as error:  # each file system fails in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"The shard {shard} cannot be fetched ({reason}); check data.path.") from error


def index_tar(path: Path, shard: int) -> list[tuple[str, str, Part]]:
    """Stem, suffix and place of every file in a tar, without reading what is in them.

    Raises:
        ValueError: where it is no whole tar.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    stem, dot, suffix = file.partition(".")
                    part = Part(shard, member.offset_data, member.size)
                    found.append((f"{folder}/{stem}", (dot + suffix).lower(), part))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is no whole tar ({error}); fetch or write it again.") from error
    return found


RECORDS = {"imagefolder": FolderRecords, "huggingface": HubRecords, "webdataset": TarRecords}
