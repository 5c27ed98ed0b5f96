"""Tiny real components that the tests share."""

# ruff: noqa: E402

import os

import torch

# without a GPU, Triton's kernels run in its interpreter, if that is said before anyone imports it, as diffusers does
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from PIL import Image

from config import TextEncoderConfig
from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from train.components import build_text_encoder, build_tokenizer

CAPTION_CHANNELS = 24
CALL_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": 8}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_as_ever(monkeypatch):
    """Commands that run in this process leave its memory to glibc, since other tests measure it."""
    for module in ("localdit.command_line", "localdit.benchmarks.pipeline", "train.command_line"):
        monkeypatch.setattr(f"{module}.keep_freed_memory", lambda: None)


@pytest.fixture(autouse=True)
def default_attention_backend():
    """Afterwards, the backend from before: a model that is given one makes it everybody's."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def make_transformer(**changes) -> LocalDiTTransformer2DModel:
    """A small text-conditioned pixel transformer, drawn as for training but for an output that is not zero."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 3,
        "num_layers": 2,
        "sample_size": 16,
        "patch_size": 2,
        "caption_channels": CAPTION_CHANNELS,
        "mixer_options": {"window": {"window_size": 3, "global_context": 2}},
    }
    transformer = LocalDiTTransformer2DModel(**{**config, **changes})
    transformer.initialize_weights()
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


def make_components(**changes) -> dict:
    """Components of a tiny pixel pipeline; `changes` replace some of them."""
    tokenizer = build_tokenizer(["a", "red", "blue", "seven"], CALL_DEFAULTS["max_sequence_length"])
    text = TextEncoderConfig(d_model=CAPTION_CHANNELS, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    components = {
        "tokenizer": tokenizer,
        "text_encoder": build_text_encoder(text, len(tokenizer)).eval(),
        "vae": None,
        "transformer": make_transformer(),
        "scheduler": DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True),
        "call_defaults": CALL_DEFAULTS,
    }
    return {**components, **changes}


def make_vae() -> AutoencoderKL:
    """A tiny autoencoder, 4 latent channels at half the size."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> LocalDiTPipeline:
    return _quiet(LocalDiTPipeline(**make_components()))


@pytest.fixture
def img2img() -> LocalDiTImg2ImgPipeline:
    return _quiet(LocalDiTImg2ImgPipeline(**make_components()))


@pytest.fixture
def inpaint() -> LocalDiTInpaintPipeline:
    return _quiet(LocalDiTInpaintPipeline(**make_components()))


@pytest.fixture
def make_pipeline():
    """The maker of tiny pipelines: give a class and the components to replace."""

    def make(pipeline_class=LocalDiTPipeline, **changes):
        return _quiet(pipeline_class(**make_components(**changes)))

    return make


@pytest.fixture
def tiny_transformer():
    """The maker of tiny transformers: give the settings to replace."""
    return make_transformer


@pytest.fixture
def latent_components() -> dict:
    """The components to replace for a pipeline that works on the latents of a tiny autoencoder, 16 x 16 pixels."""
    return {"vae": make_vae(), "transformer": make_transformer(in_channels=4, sample_size=8)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved tiny pipeline; copy it before changing anything in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LocalDiTPipeline(**make_components()).save_pretrained(folder)
    return folder


@pytest.fixture
def picture_folder(tmp_path):
    """Pictures of two classes, with captions."""
    folder = tmp_path / "pictures"
    for index, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((70 + number, 90, 3), 100 * index + 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text(f"A {name}, number {number}.")
    return folder


@pytest.fixture
def mixed_folder(tmp_path):
    """Twenty pictures of three shapes, of which one is too tall for any bucket but the tallest."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index in range(20):
        size = ((96, 96), (144, 64), (64, 144))[index % 3] if index else (20, 200)
        Image.new("RGB", size, (10 * index, 0, 0)).save(folder / f"{index:02d}.png")
    return folder
