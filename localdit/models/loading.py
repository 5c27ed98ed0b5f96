"""Loading a model whole or not at all, and checkpoints that this library did not write."""

import difflib
import functools
import logging
import os
import re
import reprlib
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin, no_init_weights
from diffusers.utils.hub_utils import _get_model_file

from localdit.conversion import (
    check_complete,
    check_names,
    from_pixart_state_dict,
    from_released,
    infer_released_config,
    is_released_format,
    load_pixart,
    pixart_config,
    read_state_dict,
)

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")

# what a browser shows, and what its download button gives
HUB_LINK = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo_id>[^/]+/[^/]+)/(?:blob|resolve)/(?P<revision>[^/]+)/"
    r"(?P<file>[^?#]+)"
)

StateDict = dict[str, torch.Tensor]


class LoadingMixin:
    """Whole models to and from folders, `from_single_file` for the released one, and `from_pixart`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a folder or a Hub id as `ModelMixin.from_pretrained` does, with the same arguments.

        Raises:
            ValueError: where the weights lack a tensor of the model or hold one that it does not know; diffusers would
                say so in the log alone, and go on.
        """
        if kwargs.get("use_flashpack", False):  # which tells nothing of what it loaded
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        check_complete(os.fspath(pretrained_model_name_or_path), info)
        return (model, info) if wants_info else model

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look for its parameters before they give them
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Write a folder as `ModelMixin.save_pretrained` does, with the same arguments.

        Raises:
            ValueError: while an adapter is loaded, fused or not: the names of its layers would fit no model.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"The adapter(s) {list(self.peft_config)} are loaded, and a folder with their layers could not be "
                "loaded again; save them by save_lora_weights or save_lora_adapter and unload_lora first, or "
                "fuse_lora and then unload_lora to keep them in the weights."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `ConfigMixin` does, but that a setting it does not know, such as a misspelt one, is an error."""
        known = cls._get_init_keys(cls) - {"self"}
        unknown = {name for name in config_dict if not name.startswith("_")} - known - {"quantization_config"}
        if unknown:
            near = sorted({match for name in unknown for match in difflib.get_close_matches(name, known, n=1)})
            hint = f", this model's nearest are {near}" if near else ""
            raise ValueError(
                f"config.json has unknown setting(s) {reprlib.repr(sorted(unknown))}{hint}; correct or remove them "
                "(a PixArt loads by from_pixart)."
            )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | StateDict,
        config: str | os.PathLike | dict[str, Any] | None = None,
        global_branch: str = "expected",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        subfolder: str | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ):
        """Load a checkpoint in the released LocalDiT's format, of any size.

        Args:
            pretrained_model_link_or_path_or_dict: a .safetensors or .pt file (a pickle that holds more than tensors is
                refused), a sharded checkpoint's index or folder, a link to a file on the Hub, or the tensors by name.
                A .gguf file holds tensors by this model's own names; it wants `config` to be a folder or Hub id and
                `quantization_config=GGUFQuantizationConfig(...)`.
            config: settings that the shapes cannot tell, as a dict that overrides what they do tell and the release's
                own: {"sample_size": 64, "mixer_options": {"window": {"window_size": 8, "shift_schedule": "cyclic"}}}.
                A folder or Hub id whose config.json describes the whole model does too.
            global_branch: "expected" (the mean over the random draws that the release makes of a branch it never
                saved, half of the window attention) or "off"; see `localdit.conversion.from_released`.
            dtype, torch_dtype: of the weights; fp32 by default.
            subfolder: of `config`, where that is a folder or Hub id.
            device: where to; the CPU by default.
            kwargs: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token` and `revision` of a Hub link.

        Returns:
            the model, in evaluation mode.

        Raises:
            ValueError: where the file is missing, damaged or could run code, or any tensor is missing or too much.
        """
        given = pretrained_model_link_or_path_or_dict
        dtype = dtype or torch_dtype or torch.float32
        if not isinstance(given, dict) and os.fspath(given).endswith(".gguf"):
            if not isinstance(config, str | os.PathLike):
                raise ValueError(f"{given} tells no config; give config= the folder or Hub id that has config.json.")
            kwargs |= {"config": os.fspath(config), "subfolder": subfolder, "dtype": dtype, "device": device}
            return super().from_single_file(os.fspath(given), **kwargs)  # diffusers reads these, and quantized ones
        unknown = sorted(set(kwargs) - set(HUB_ARGUMENTS))
        if unknown:
            raise ValueError(f"from_single_file does not know {unknown}; beside config= it takes {HUB_ARGUMENTS}.")
        if not isinstance(config, str | os.PathLike | dict | None):
            raise TypeError(f"config={config!r} is of type {type(config).__name__}; give a dict, a folder or a Hub id.")
        if isinstance(given, dict):
            if wrong := [name for name, tensor in given.items() if not isinstance(tensor, torch.Tensor)]:
                raise TypeError(
                    f"The state dict holds a {type(given[wrong[0]]).__name__} as {wrong[0]!r}; give tensors."
                )
            state_dict, source = {name: tensor.detach().clone() for name, tensor in given.items()}, "The state dict"
        else:
            path = _local_path(os.fspath(given), **kwargs)
            state_dict, source = read_state_dict(path), str(path)

        if wrong := [name for name, tensor in state_dict.items() if not tensor.is_floating_point()]:
            raise ValueError(f"{source} holds {wrong[0]} in {state_dict[wrong[0]].dtype}; give floating-point weights.")
        described = isinstance(config, str | os.PathLike)
        if is_released_format(state_dict):
            settings = infer_released_config(state_dict) if not described else {}
            state_dict, dead = from_released(state_dict, global_branch)
            parameters = sum(tensor.numel() for tensor in dead.values())
            logger.warning("%s: dropped %d tensors (%d parameters) that nothing reads.", source, len(dead), parameters)
        elif any("lora" in name for name in state_dict):
            raise ValueError(f"{source} holds LoRA adapters, no model; load them with load_lora_weights.")
        elif config is None:
            raise ValueError(
                f"{source} is no released LocalDiT (it has no transformer_blocks.0.attn1.to_qkv.weight); load a folder "
                "with from_pretrained, a PixArt with from_pixart, or give config= for tensors by this model's names."
            )
        else:
            settings = {}
        if described:
            settings = cls.load_config(config, subfolder=subfolder, **kwargs)
        else:
            settings |= config or {}
            unknown = sorted(set(settings) - cls._get_init_keys(cls))
            if unknown:
                raise ValueError(f"config has unknown key(s) {unknown}; it may hold the model's own arguments.")

        with no_init_weights():  # every tensor is replaced below
            model = cls.from_config(settings)
        check_names(model.state_dict(), state_dict, source)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
        return model.eval().to(device or "cpu")

    @classmethod
    def from_pixart(
        cls,
        pixart: str | os.PathLike | PixArtTransformer2DModel,
        token_mixers: str | tuple[str, ...] = ("full",),
        mixer_options: dict[str, dict[str, Any]] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        """Start from a PixArt-alpha or -Sigma transformer.

        With the mixer "full" the outputs are the PixArt's own; with others they are where fine-tuning starts. What a
        mixer learns beside the projections (a bias table, the context's embedding) starts at zero.

        Args:
            pixart: the transformer, or the folder or Hub id of it or of its pipeline.
            token_mixers, mixer_options: as in the constructor.
            dtype: of the weights; by default the given PixArt's, or fp32 for one that is loaded.
            kwargs: for `PixArtTransformer2DModel.from_pretrained`.

        Returns:
            the model, in evaluation mode, sharing no memory with the PixArt.

        Raises:
            ValueError: where there is no PixArt, or it has settings that this model has not.
        """
        source = load_pixart(pixart, **kwargs)
        mixers = (token_mixers,) if isinstance(token_mixers, str) else tuple(token_mixers)
        model = cls(**pixart_config(source.config), token_mixers=mixers, mixer_options=mixer_options)
        state_dict = from_pixart_state_dict(source.state_dict())
        learned_by_mixers = {name: tensor for name, tensor in model.state_dict().items() if ".attn.processor." in name}
        check_names(model.state_dict(), learned_by_mixers | state_dict, "The PixArt transformer")
        model.load_state_dict(state_dict, strict=False)
        dtype = dtype or source.dtype
        if dtype != torch.float32:
            network: Any = model
            torch.nn.Module.to(network, dtype)  # diffusers' own warns of what is to stay in fp32, which is seen to here
            for name, module in network.named_modules():
                if name.rpartition(".")[2] in cls._keep_in_fp32_modules:
                    module.float()
        return model.eval()


def _local_path(link_or_path: str, **kwargs: Any) -> str:
    """The path of a checkpoint, which a link to the Hub is downloaded for."""
    if "://" not in link_or_path:
        return link_or_path
    link = HUB_LINK.match(link_or_path)
    if link is None:
        raise ValueError(f"{link_or_path!r} links to no file; give https://huggingface.co/OWNER/NAME/blob/main/FILE.")
    try:
        where = {"weights_name": link["file"], "revision": link["revision"], **kwargs}
        return _get_model_file(link["repo_id"], **where)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{link_or_path!r} cannot be had from the Hub ({reason}); check the link.") from error
