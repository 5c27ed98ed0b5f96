"""Every score is the same from one process and from several, which share the pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from localdit.data.digit_scenes import render, sample_scene
from localdit.evaluation import processes
from localdit.evaluation.digit_extractor import DigitNetwork, save_digit_network
from localdit.evaluation.digit_scenes import DigitSceneReader
from localdit.evaluation.long_range import draw_pairs
from localdit.evaluation.perceptual import Lpips
from tests.evaluation_processes import run_all

COUNT = 13  # an odd number, so that one process gets one more
MIXED = [(64, 64), (64, 64), (48, 64), (40, 56), (64, 64), (64, 64), (64, 64)]  # sizes that interrupt batches
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_networks(folder: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    save_digit_network(DigitNetwork(8).eval(), folder / "extractor", 0.1)
    save_file(DigitSceneReader().state_dict(), folder / "reader.safetensors")
    state = Lpips("alex").features.state_dict()
    save_file({f"features.{name}": tensor for name, tensor in state.items()}, folder / "alex.safetensors")
    text = {**SMALL, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 20, "patch_size": 10}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder / "clip")
    words = "<unk> </s> a red green blue yellow cyan magenta one two three four five six seven eight nine zero to the "
    words += "left right of above below on black white gray background"
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words.split())}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ends = {"pad_token": "</s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder / "clip")


def save_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("scenes", "others", "pairs", "mixed", "blurred", "one"):
        (folder / name).mkdir()
    for index in range(COUNT):
        scene = sample_scene(rng)
        Image.fromarray(render(scene, rng)).save(folder / "scenes" / f"{index:02}.png")
        (folder / "scenes" / f"{index:02}.txt").write_text(scene.caption)
        Image.fromarray(render(sample_scene(rng), rng)).save(folder / "others" / f"{index:02}.png")
    for index, picture in enumerate(draw_pairs(COUNT, rng, match=0.5)[0]):
        Image.fromarray(picture).save(folder / "pairs" / f"{index:02}.png")
    for index, (width, height) in enumerate(MIXED):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / "mixed" / f"{index}.png")
        picture.reduce(2).resize((width, height)).save(folder / "blurred" / f"{index}.png")
    Image.fromarray(render(scene, rng)).save(folder / "one" / "0.png")
    (folder / "one" / "0.txt").write_text("a red seven on a black background")


def commands(folder: Path, output: str) -> list[tuple[str, list[str]]]:
    """All commands that score; the last ones of a folder with fewer pictures than processes."""
    written, device = ["--output", str(folder / output)], ["--device", "cpu"]
    scenes, clip = str(folder / "scenes"), ["--model", str(folder / "clip"), "--batch_size", "4"]
    grid = ["--period", "32", "--patch", "8"]
    others, reader = str(folder / "others"), str(folder / "reader.safetensors")
    extractor = ["--extractor", str(folder / "extractor"), "--batch_size", "4", "--resamples", "4"]
    vae = ["--vae", str(folder / "vae")]
    weights = ["--weights", str(folder / "alex.safetensors"), "--batch_size", "2"]
    return [
        ("score_folders", ["--generated", scenes, "--real", others, *extractor, *device, *written]),
        ("alignment", [scenes, *clip, *device, *written]),
        ("perceptual", [str(folder / "mixed"), str(folder / "blurred"), *weights, *device, *written]),
        ("reconstruct", [others, *vae, *device, "--output", str(folder / f"{output}-images"), "--scores", written[1]]),
        ("seams", [scenes, *grid, "--offset", "0", "--offset", "16", "--real", others, *written]),
        ("long_range", [str(folder / "pairs"), *written]),
        ("digit_scenes", ["score", "--images", scenes, "--reader", reader, *written]),
        ("alignment", [str(folder / "one"), *clip, *device, *written]),
        ("perceptual", [str(folder / "one"), str(folder / "one"), *weights, *device, *written]),
    ]


def test_one_process_and_two_find_the_same_scores(tmp_path):
    save_networks(tmp_path)
    save_pictures(tmp_path)
    run_all(commands(tmp_path, "one.jsonl"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, "-m", "tests.evaluation_processes", json.dumps(commands(tmp_path, "two.jsonl"))],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=600,
    )
    texts = [(tmp_path / f"{name}.jsonl").read_text().replace("two.jsonl", "one.jsonl") for name in ("one", "two")]
    one, two = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert {
        "fid",
        "clip_score",
        "lpips",
        "psnr",
        "seams",
        "seams_to_real",
        "long_range_cramers_v",
        "scenes_correct",
    } <= {record["metric"] for record in one}
    written = [{path.name for path in (tmp_path / f"{name}.jsonl-images").glob("*.png")} for name in ("one", "two")]
    assert written[0] == written[1] == {f"{index:02}.png" for index in range(COUNT)}
    for mine, theirs in zip(one, two, strict=True):
        for name in ("value", "interval"):
            assert theirs.pop(name) == pytest.approx(mine.pop(name), rel=1e-4, abs=1e-4), mine["metric"]
        assert theirs == mine


def test_what_processes_made_of_their_parts_comes_back_in_order(monkeypatch):
    items = list("abcdefg")

    class State:
        num_processes = 3

        def __init__(self, index: int = 0):
            self.process_index = index

    def part(index: int) -> list[str]:
        monkeypatch.setattr(processes, "PartialState", lambda: State(index))
        return list(processes.own_part(items))

    parts = [part(index) for index in range(3)]
    assert sorted(sum(parts, [])) == items and max(map(len, parts)) - min(map(len, parts)) <= 1
    monkeypatch.setattr(processes, "gather_object", lambda mine: parts)
    assert processes.gathered(parts[0]) == items


def test_batches_are_read_when_they_are_asked_for():
    begun: list[int] = []
    batches = processes.in_batches((begun.append(number) or number for number in range(5)), 2)
    assert next(batches) == [0, 1] and begun == [0, 1]
    assert list(batches) == [[2, 3], [4]]
