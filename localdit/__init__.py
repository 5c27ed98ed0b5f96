"""LocalDiT: diffusion transformers whose attention is kept local, native to diffusers.

Importing this package registers its classes with diffusers, so that `DiffusionPipeline.from_pretrained`, `AutoPipeline`
and the caches know them.
"""

import importlib
import logging
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import diffusers
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from localdit.hub import push_to_hub
from localdit.models.block import LocalDiTBlock
from localdit.models.transformer_localdit import LocalDiTTransformer2DModel
from localdit.version import VERSION

__version__ = VERSION

__all__ = [
    "LocalDiTClassPipeline",
    "LocalDiTImg2ImgPipeline",
    "LocalDiTInpaintPipeline",
    "LocalDiTPipeline",
    "LocalDiTTransformer2DModel",
]


# diffusers' other pipelines, imported below, make transformers warn of a missing torchvision, which nothing here uses
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in str(record.msg))


def _use_pipelines_of_checkout() -> None:
    """In a checkout, where `pipelines/` is not inside this package but beside it, make it `localdit.pipelines`.

    An editable installation would do so too, but may be one of another checkout.
    """
    folder = Path(__file__).parent.parent / "pipelines"
    if (Path(__file__).parent / "pipelines").is_dir():
        return
    spec = spec_from_file_location(
        "localdit.pipelines", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is missing; copy the whole checkout, or install localdit.")
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def _pipeline(module: str, name: str) -> type:
    return getattr(importlib.import_module(f"localdit.pipelines.{module}"), name)


_use_pipelines_of_checkout()
LocalDiTPipeline = _pipeline("pipeline_localdit", "LocalDiTPipeline")
LocalDiTImg2ImgPipeline = _pipeline("pipeline_localdit_img2img", "LocalDiTImg2ImgPipeline")
LocalDiTInpaintPipeline = _pipeline("pipeline_localdit_inpaint", "LocalDiTInpaintPipeline")
LocalDiTClassPipeline = _pipeline("pipeline_localdit_class", "LocalDiTClassPipeline")
PIPELINES = (LocalDiTPipeline, LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTClassPipeline)


def _register_with_diffusers() -> None:
    # not before the filter above, since these import every pipeline
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from diffusers.pipelines import auto_pipeline

    # What each line is for was measured against diffusers 0.42; tests/test_registration.py holds diffusers to it.
    LocalDiTTransformer2DModel.__module__ = "localdit"  # save_pretrained writes ["localdit", ...]
    diffusers.pipelines.localdit = sys.modules["localdit"]  # where loading looks a component's library up
    for cls in (*PIPELINES, LocalDiTTransformer2DModel):
        setattr(diffusers, cls.__name__, cls)  # where loading looks a class name up
    for cls in PIPELINES:
        setattr(diffusers.pipelines, cls.__name__, cls)  # where diffusers' pipeline testers look
        # from_pipe accepts a component only where its exact class is annotated, and pipelines never import localdit
        cls.__init__.__annotations__["transformer"] = LocalDiTTransformer2DModel
        cls.push_to_hub = push_to_hub  # diffusers' own pushes no code
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.update(localdit=LocalDiTPipeline)
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.update(localdit=LocalDiTImg2ImgPipeline)
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING.update(localdit=LocalDiTInpaintPipeline)
    # the tensors of a .gguf come by our own names, so nothing is renamed
    SINGLE_FILE_LOADABLE_CLASSES["LocalDiTTransformer2DModel"] = {
        "checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint
    }
    TransformerBlockRegistry.register(
        LocalDiTBlock,
        TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),  # pyright: ignore[reportArgumentType]
    )


_register_with_diffusers()
