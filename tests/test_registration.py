"""Facts about living in diffusers: after `import localdit` its loaders know our classes, of which there is one each."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from diffusers.hooks._helpers import TransformerBlockRegistry
from PIL import Image

import localdit
from localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel

PICTURE = Image.effect_noise((16, 16), 80).convert("RGB")
LOADERS = {
    "base class": (DiffusionPipeline, LocalDiTPipeline),
    "text to image": (LocalDiTPipeline, LocalDiTPipeline),
    "image to image": (LocalDiTImg2ImgPipeline, LocalDiTImg2ImgPipeline),
    "auto text to image": (AutoPipelineForText2Image, LocalDiTPipeline),
    "auto image to image": (AutoPipelineForImage2Image, LocalDiTImg2ImgPipeline),
}


def test_from_pipe_leaves_every_component_in_its_own_precision(pipeline, caplog):
    pipeline.text_encoder.half()
    pipeline.transformer.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    caplog.clear()
    made = LocalDiTImg2ImgPipeline.from_pipe(pipeline)
    assert not caplog.messages, "nothing to warn of"
    assert (made.text_encoder.dtype, made.transformer.dtype) == (torch.float16, torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.transformer.state_dict().items())


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": PICTURE, "strength": 0.5} if isinstance(pipeline, LocalDiTImg2ImgPipeline) else {}
    return pipeline("a red seven", generator=torch.Generator().manual_seed(0), output_type="pt", **image).images


def storages(pipeline):
    """The component objects, and where the weights lie."""
    parts = {name: id(part) for name, part in pipeline.components.items()}
    modules = (pipeline.transformer, pipeline.text_encoder)
    return parts, [parameter.data_ptr() for module in modules for parameter in module.parameters()]


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_of_diffusers_returns_our_class(model_folder, loader):
    loading_class, expected_class = LOADERS[loader]
    pipeline = loading_class.from_pretrained(model_folder)
    assert type(pipeline) is expected_class and type(pipeline.transformer) is LocalDiTTransformer2DModel
    assert torch.equal(draw(pipeline), draw(expected_class.from_pretrained(model_folder)))


@pytest.mark.parametrize("loader", LOADERS)
def test_what_any_loader_loaded_is_saved_as_it_was(model_folder, tmp_path, loader):
    loading_class, expected_class = LOADERS[loader]
    pipeline = loading_class.from_pretrained(model_folder)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == expected_class.__name__
    assert index["transformer"] == ["localdit", "LocalDiTTransformer2DModel"]
    again = loading_class.from_pretrained(tmp_path)
    assert type(again) is expected_class and torch.equal(draw(again), draw(pipeline))


@pytest.mark.parametrize(
    "change",
    [
        LocalDiTImg2ImgPipeline.from_pipe,
        AutoPipelineForImage2Image.from_pipe,
        lambda pipeline: LocalDiTImg2ImgPipeline(**pipeline.components, call_defaults=pipeline.config.call_defaults),
    ],
)
def test_image_to_image_from_text_to_image_shares_every_weight(pipeline, change):
    changed = change(pipeline)
    assert type(changed) is LocalDiTImg2ImgPipeline
    assert storages(changed) == storages(pipeline)
    assert changed.config.call_defaults == pipeline.config.call_defaults


def test_text_to_image_from_image_to_image_shares_every_weight(img2img):
    for change in (LocalDiTPipeline.from_pipe, AutoPipelineForText2Image.from_pipe):
        changed = change(img2img)
        assert type(changed) is LocalDiTPipeline and storages(changed) == storages(img2img)


def test_the_transformer_is_found_by_auto_model(model_folder):
    for found in (
        AutoModel.from_pretrained(str(model_folder), subfolder="transformer"),
        AutoModel.from_pretrained(str(model_folder / "transformer")),
        LocalDiTTransformer2DModel.from_pretrained(model_folder / "transformer"),
    ):
        assert type(found) is LocalDiTTransformer2DModel


def test_a_device_map_places_the_components(model_folder):
    pipeline = DiffusionPipeline.from_pretrained(model_folder, device_map="cpu")
    assert torch.equal(draw(pipeline), draw(LocalDiTPipeline.from_pretrained(model_folder)))


def test_the_caches_of_diffusers_know_the_block(pipeline):
    block = pipeline.transformer.transformer_blocks[0]
    assert TransformerBlockRegistry.get(type(block)).return_hidden_states_index == 0


def test_our_classes_are_attributes_of_diffusers():
    for name in localdit.__all__:
        assert getattr(diffusers, name) is getattr(localdit, name)


# Other processes

PROGRAM = """
import gc, sys
import localdit
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
import torch

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline) is localdit.LocalDiTPipeline
assert type(AutoPipelineForImage2Image.from_pipe(pipeline)) is localdit.LocalDiTImg2ImgPipeline
image = pipeline("a red seven", generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(image, sys.argv[2])
names = [thing.__name__ for thing in gc.get_objects() if isinstance(thing, type) and "LocalDiT" in thing.__name__]
assert len(names) == len(set(names)) > 5, names
module = localdit.LocalDiTPipeline.__module__
print(module, sys.modules[module].__file__, localdit.__file__)
"""


@pytest.fixture(params=["checkout", "installed"])
def library(request, tmp_path):
    """A folder to import localdit from, and the folder that its pipelines are in."""
    root = request.config.rootpath
    if request.param == "checkout":
        return root, root / "pipelines"
    # as setup.py nests it in the wheel
    shutil.copytree(root / "localdit", tmp_path / "site/localdit", ignore=shutil.ignore_patterns("pretrained"))
    shutil.copytree(root / "pipelines", tmp_path / "site/localdit/pipelines")
    return tmp_path / "site", tmp_path / "site/localdit/pipelines"


def test_the_library_works_from_any_folder_and_has_one_copy_of_each_class(library, model_folder, tmp_path):
    site, pipelines = library
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = subprocess.run(
        # -S, because the site module would bring in an editable installation of localdit
        [sys.executable, "-S", "-c", PROGRAM, str(model_folder), str(tmp_path / "image.pt")],
        cwd=elsewhere,
        env={
            "PYTHONPATH": os.pathsep.join((str(site), sysconfig.get_path("purelib"))),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    module, file, front_door = result.stdout.split()
    assert module == "localdit.pipelines.pipeline_localdit"
    assert (Path(file).parent, Path(front_door)) == (pipelines, site / "localdit/__init__.py")
    assert "torchvision" not in result.stderr
    assert torch.allclose(torch.load(tmp_path / "image.pt"), draw(LocalDiTPipeline.from_pretrained(model_folder)))
