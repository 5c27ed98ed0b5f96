"""Writes pictures of a recipe's data as training sees them, to score drawn ones against.

python -m train.real_pictures --run train/recipes/digit_scenes.yaml --count 2000 --output output/scenes/images

Captions go into a .txt beside each picture, and one a line into prompts.txt beside the folder, for
python -m localdit.evaluation generate.
"""

from pathlib import Path

from PIL import Image
from tqdm import tqdm

from config import RealPicturesConfig
from train.command_line import parse, run
from train.components import condition_of, model_settings
from train.data import Source
from train.datasets import build_dataset
from train.settings import check_output_dir, check_ranges

PROMPTS = "prompts.txt"


def write_pictures(config: RealPicturesConfig) -> int:
    """Write the pictures into `config.output`, and return how many there are.

    Raises:
        ValueError: where the folder holds something already, or the data are latents or too few.
    """
    check_ranges(config)
    check_output_dir(config.output)
    folder = Path(config.output)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output={config.output!r} is not empty; choose another folder.")
    if config.run.data.name == "precomputed":
        raise ValueError("run.data.name='precomputed' has no pictures; name the data that were precomputed.")
    source = build_dataset(config.run.data, config.run.seed, condition_of(model_settings(config.run)), config.split)
    keys = [key for group in source.every(config.count).values() for key in group]
    if config.count is not None and len(keys) < config.count:
        raise ValueError(f"count={config.count} are more pictures than there are ({len(keys)}); ask for fewer.")
    folder.mkdir(parents=True, exist_ok=True)
    captions = [
        write_one(source, key, folder / f"{number:05}.png")
        for number, key in enumerate(tqdm(keys[: config.count], unit="picture", disable=None))
    ]
    if captions[0] is not None:
        (folder.parent / PROMPTS).write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    return len(captions)


def write_one(source: Source, key: object, path: Path) -> str | None:
    """Write one picture, with its caption beside it, which is returned."""
    item = source[key]
    pixels = ((item["image"] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
    caption = item.get("caption")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return caption


def main() -> None:
    config = parse(RealPicturesConfig, "train.real_pictures")
    print(f"{write_pictures(config)} pictures in {config.output}")


if __name__ == "__main__":
    run("train.real_pictures", main)
