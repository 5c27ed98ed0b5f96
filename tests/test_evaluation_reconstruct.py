"""An autoencoder's reconstructions: PSNR, pictures as the autoencoder decodes them, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.command_line import PRETRAINED
from localdit.data.digit_scenes import render, sample_scene
from localdit.evaluation.reconstruct import load_autoencoder, main, psnr, reconstruct
from tests.conftest import make_vae


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return make_vae()


@pytest.fixture
def scenes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "scenes" / "more").mkdir(parents=True)
    for index in range(3):
        image = Image.fromarray(render(sample_scene(rng), rng))
        image.save(tmp_path / "scenes" / ("more" if index == 2 else "") / f"{index}.png")
    return tmp_path / "scenes"


@pytest.fixture
def autoencoder(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def run(folder, vae, output, *more):
    main([str(folder), "--vae", str(vae), "--output", str(output), "--device", "cpu", *more])


def test_psnr_is_its_formula():
    first, second = picture(0, 40, 30), picture(1, 40, 30)
    difference = np.asarray(first, float) - np.asarray(second, float)
    assert psnr(first, second) == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()), rel=1e-6)
    assert psnr(first, first) == 100


def test_the_shipped_autoencoder_keeps_scenes_and_a_random_one_does_not(vae):
    rng = np.random.default_rng(0)
    scene = Image.fromarray(render(sample_scene(rng), rng))
    trained = load_autoencoder(str(PRETRAINED))
    assert psnr(scene, reconstruct(trained, scene)) > 20 > psnr(scene, reconstruct(vae, scene))


def test_a_reconstruction_is_what_the_autoencoder_decodes(vae):
    image = picture(0, 64, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    expected = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().detach().numpy()
    found = np.asarray(reconstruct(vae, image)).astype(float)
    assert found.shape == (32, 64, 3)
    assert np.abs(found - expected).max() <= 1  # of 255, as roundings may differ


def test_a_folder_is_written_by_name_and_scored(scenes, autoencoder, tmp_path):
    output = tmp_path / "run" / "images"
    run(scenes, autoencoder, output)
    names = ["0.png", "1.png", "more/2.png"]
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.png")) == names
    record = json.loads((tmp_path / "run" / "scores.jsonl").read_text())
    pairs = [[Image.open(folder / name) for folder in (scenes, output)] for name in names]
    assert record["metric"] == "psnr"
    assert record["value"] == pytest.approx(np.mean([psnr(*pair) for pair in pairs]))
    assert record["real"]["source"] == str(scenes)
    assert record["generated"]["count"] == 3
    told = json.loads((output / "generation.json").read_text())
    assert record["generation"].items() <= told.items()
    assert told["vae"] == str(autoencoder)
    assert len(told["vae_sha256"]) == 64


@pytest.mark.parametrize(
    ("mend", "message"),
    [
        (lambda folder: picture(0, 63, 64).save(folder / "odd.png"), "63 x 64 pixels"),
        (lambda folder: picture(0).save(folder / "0.jpg"), "Two pictures would be written to '0.png'"),
    ],
)
def test_pictures_that_cannot_be_written_are_told_of(scenes, autoencoder, tmp_path, mend, message):
    mend(scenes)
    with pytest.raises(ValueError, match=message):
        run(scenes, autoencoder, tmp_path / "images")


def test_pictures_that_are_there_stay(scenes, autoencoder):
    before = (scenes / "0.png").read_bytes()
    with pytest.raises(ValueError, match="holds pictures already"):
        run(scenes, autoencoder, scenes)
    assert (scenes / "0.png").read_bytes() == before


@pytest.mark.parametrize("source", ["nowhere", "scenes", "transformer"])
def test_what_is_no_autoencoder_is_told_of(scenes, tmp_path, source):
    folder = {"scenes": str(scenes), "transformer": str(PRETRAINED / "transformer")}.get(source, str(tmp_path / source))
    with pytest.raises(ValueError, match="is, and holds, no autoencoder"):
        run(scenes, folder, tmp_path / "images")
