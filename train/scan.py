"""Looks through pictures before they are trained on: python -m train.scan --data.path FOLDER --output scan.json.

The report tells how many pictures there are, which cannot be read, which look alike, which lack a caption, and how
many go into each bucket.
A run that is given it as `data.scan` leaves out the unreadable ones and all but the first of what looks alike.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import ScanConfig
from train.buckets import bucket_sizes, nearest_buckets
from train.command_line import parse, run
from train.pictures import Records, as_rgb, reason, upright_size
from train.records import load_records
from train.settings import check_ranges

BITS = 64  # of a perceptual hash


class Looks(Dataset):
    """Of each row its name, size, perceptual hash and caption, or why it cannot be read."""

    def __init__(self, records: Records):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        import imagehash

        name = self.records.name(row)
        try:
            with self.records.open(row) as image:
                look = imagehash.phash(as_rgb(image))
        except Exception as error:  # damaged bytes make a decoder fail in any way
            return {"name": name, "reason": reason(error)}
        height, width = upright_size(self.records, row)
        return {"name": name, "height": height, "width": width, "hash": int(str(look), 16), **self._caption(row)}

    def _caption(self, row: int) -> dict[str, Any]:
        try:
            return {"caption": self.records.caption(row)}
        except ValueError as error:
            return {"caption": None, "without": reason(error)}


def scan(config: ScanConfig) -> dict[str, Any]:
    """Read every picture and write the report to `config.output`, which is returned."""
    check_ranges(config)
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"output={config.output!r} exists; choose another name.")
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise ImportError("Looking for alike pictures needs the package imagehash; pip install imagehash.") from error
    records = load_records(config.data, condition=None)
    loader = DataLoader(Looks(records), batch_size=None, num_workers=config.data.num_workers)
    looks = list(tqdm(loader, unit="picture", dynamic_ncols=True))
    readable = [look for look in looks if "hash" in look]
    groups = alike([look["hash"] for look in readable], config.max_distance)
    sizes = [(look["height"], look["width"]) for look in readable]
    report = {
        "pictures": len(looks),
        "unreadable": [look for look in looks if "reason" in look],
        "alike": [[readable[index]["name"] for index in group] for group in groups],
        "captions": captions_of(readable),
        "buckets": bucket_plan(sizes, config),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def captions_of(readable: list[dict[str, Any]]) -> dict[str, Any]:
    """How many pictures have a caption, how many of these are distinct, the longest; and those that should have one."""
    captions = [look["caption"] for look in readable if look["caption"]]
    lacking = [look for look in readable if not look["caption"]] if captions else []  # else there are none by design
    return {
        "pictures": len(captions),
        "distinct": len(set(captions)),
        "most_words": max((len(caption.split()) for caption in captions), default=0),
        "lacking": [{"name": look["name"], "reason": look.get("without", "it is empty")} for look in lacking],
    }


def bucket_plan(sizes: list[tuple[int, int]], config: ScanConfig) -> dict[str, int]:
    """How many pictures go into each bucket of the data's settings."""
    buckets = bucket_sizes(config.data)
    counts = Counter(nearest_buckets(sizes, buckets).tolist()) if sizes else {}
    return {f"{height} x {width}": counts[index] for index, (height, width) in enumerate(buckets) if counts.get(index)}


def alike(hashes: list[int], max_distance: int) -> list[list[int]]:
    """Groups of two and more whose hashes are joined by steps of at most so many bits, each in ascending order.

    Of two hashes that differ in d bits, one of d + 1 parts is equal; only pairs with an equal part are compared.
    """
    edges = np.linspace(0, BITS, max_distance + 2).astype(int)
    leader = list(range(len(hashes)))

    def lead(index: int) -> int:
        while leader[index] != index:
            leader[index] = index = leader[leader[index]]
        return index

    for low, high in zip(edges[:-1], edges[1:], strict=True):
        same_part = defaultdict(list)
        for index, value in enumerate(hashes):
            part = (value >> int(low)) & ((1 << int(high - low)) - 1)
            for other in same_part[part]:
                if lead(other) != lead(index) and (value ^ hashes[other]).bit_count() <= max_distance:
                    leader[max(lead(other), lead(index))] = min(lead(other), lead(index))
            same_part[part].append(index)
    groups = defaultdict(list)
    for index in range(len(hashes)):
        groups[lead(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]


def main() -> None:
    config = parse(ScanConfig, "train.scan")
    report = scan(config)
    spare = sum(len(group) - 1 for group in report["alike"])
    print(f"{report['pictures']} pictures, {len(report['unreadable'])} unreadable, {spare} like another one.")
    captions = report["captions"]
    if captions["pictures"]:
        print(
            "{pictures} captions, {distinct} of them distinct, of {most_words} words at most".format(**captions), end=""
        )
        print(f"; {len(captions['lacking'])} pictures have none.")
    print(", ".join(f"{size}: {count}" for size, count in report["buckets"].items()))
    print(f"{config.output}; train without them by --data.scan {config.output}")


if __name__ == "__main__":
    run("train.scan", main)
