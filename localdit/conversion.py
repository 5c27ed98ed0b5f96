"""Checkpoints of others: the released LocalDiT and PixArt, to this model and back."""

import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# C is the width of a token

GLOBAL_BRANCHES = ("expected", "off")
STATE_DICT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")

# What the shapes of a released checkpoint cannot tell, as its published settings have it.
RELEASED_CONFIG = {
    "sample_size": 128,
    "qk_norm": "rms_norm",
    "qk_norm_eps": 1e-10,
    "rope_theta": 10000.0,
    "attention_residual": True,
    "token_mixers": ["window"],
    "mixer_options": {"window": {"window_size": 4, "shift_schedule": "cyclic"}},
}
# The release carries projections that its own code never reads; the live ones are fused for the tokens' attention and
# split for the text's.
DEAD = re.compile(r"transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn2\.to_kv)\.(weight|bias)")


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        path: a .safetensors file, a .pt, .pth, .ckpt or .bin file that holds nothing but tensors, the
            .safetensors.index.json of a sharded checkpoint, or a folder with one of these.

    Raises:
        ValueError: where there is no such file, it is damaged, or loading it would run code.
    """
    path = _checkpoint_file(Path(path))
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        missing = [name for name in shards if not (path.parent / name).is_file()]
        if missing:
            raise ValueError(f"{path} names shards that are not there: {missing}; download them anew.")
        return {name: tensor for shard in shards for name, tensor in read_state_dict(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it anew.") from error
    return _read_pickle(path)


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("it names no files")
        return sorted(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it is no JSON with a weight_map; download it anew.") from error


def _checkpoint_file(path: Path) -> Path:
    """The file that `path` names, or the only checkpoint of the folder that it names."""
    if path.is_file():
        if not path.name.endswith((*STATE_DICT_SUFFIXES, *INDEX_SUFFIXES)):
            raise ValueError(f"{path} is no checkpoint; give a file that ends in {', '.join(STATE_DICT_SUFFIXES)}.")
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give the path of a checkpoint.")
    found = sorted(file for file in path.iterdir() if file.name.endswith(INDEX_SUFFIXES)) or sorted(
        file for file in path.iterdir() if file.suffix in STATE_DICT_SUFFIXES
    )
    if len(found) != 1:
        names = [file.name for file in found]
        raise ValueError(f"{path} holds {len(found)} checkpoints {names}; name the file itself.")
    return found[0]


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # flipped bytes fail in as many ways as an unpickler has instructions
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds more than tensors, and loading it could run code, so it was not loaded; "
                "convert it to .safetensors where you trust it."
            ) from error
        raise ValueError(f"{path} is damaged or no .pt file ({_first_line(error)}); download it anew.") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} is no state dict (names to tensors); save model.state_dict() instead.")
    return dict(content)


def write_state_dict(state_dict: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write tensors to a .safetensors file that appears only when it is whole.

    Raises:
        ValueError: where the name does not end in .safetensors, or the file exists.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors; choose {path.with_suffix('.safetensors')}.")
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder) / path.name
        save_file(
            {name: tensor.contiguous() for name, tensor in state_dict.items()}, partial, metadata={"format": "pt"}
        )
        os.replace(partial, path)


def is_released_format(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are the names of a released LocalDiT."""
    return "transformer_blocks.0.attn1.to_qkv.weight" in state_dict


def infer_released_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of `LocalDiTTransformer2DModel` that the shapes of a released checkpoint tell, and its settings.

    Raises:
        ValueError: where a tensor that they are read from is missing or cannot belong to such a model.
    """

    def shape(name: str, axes: int) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"The checkpoint has no {name}; it is no released LocalDiT.")
        found = state_dict[name].shape
        if len(found) != axes or 0 in found:
            raise ValueError(f"The checkpoint's {name} is {list(found)}; it is no released LocalDiT.")
        return found

    width, in_channels, patch_size, _ = shape("pos_embed.proj.weight", 4)
    (head_dim,) = shape("transformer_blocks.0.attn1.norm_q.weight", 1)
    outputs, _ = shape("proj_out.weight", 2)
    if width % head_dim or outputs % patch_size**2:
        raise ValueError(
            f"The checkpoint is {width} wide with heads of {head_dim} and {outputs} outputs for patches of "
            f"{patch_size} x {patch_size}, which do not divide; it is no released LocalDiT."
        )
    layers = {int(block[1]) for name in state_dict if (block := re.match(r"transformer_blocks\.(\d+)\.", name))}
    return {
        **RELEASED_CONFIG,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": outputs // patch_size**2,
        "num_layers": max(layers) + 1,
        "patch_size": patch_size,
        "caption_channels": shape("caption_projection.linear_1.weight", 2)[1],
        "use_additional_conditions": "adaln_single.emb.resolution_embedder.linear_1.weight" in state_dict,
    }


def from_released(
    state_dict: Mapping[str, torch.Tensor], global_branch: str = "expected"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rename a released LocalDiT's tensors to this model's.

    Args:
        state_dict: the tensors of the release, by name.
        global_branch: what stands for the release's second attention branch, which its code adds to the first and
            halves, but whose weights were never trained or saved and are drawn anew at every load. "expected" is the
            mean over such draws, half of the first branch, and is folded into `to_out`; "off" leaves the branch out.

    Returns:
        this model's tensors, and those that the release carries but never reads.
    """
    check_global_branch(global_branch)
    live, dead = {}, {}
    for name, tensor in state_dict.items():
        if DEAD.fullmatch(name):
            dead[name] = tensor
        elif ".attn1.to_qkv." in name:
            if not tensor.ndim or tensor.shape[0] % 3:
                raise ValueError(f"{name} is {list(tensor.shape)}, no fused query, key and value; download it anew.")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                live[name.replace(".attn1.to_qkv.", f".attn.to_{part}.")] = (
                    piece.clone()
                )  # safetensors saves no views of one tensor
        elif global_branch == "expected" and name.endswith(".attn1.to_out.0.weight"):
            live[name.replace(".attn1.", ".attn.")] = tensor * 0.5
        else:
            live[name.replace(".attn1.", ".attn.").replace(".attn2.", ".cross_attn.")] = tensor
    return live, dead


def to_released(
    state_dict: Mapping[str, torch.Tensor], global_branch: str = "expected", dead_copies: bool = True
) -> dict[str, torch.Tensor]:
    """Rename this model's tensors to those of the released LocalDiT: the inverse of `from_released`.

    Args:
        state_dict: tensors of a model that `check_releasable` lets pass.
        global_branch: as it was given to `from_released`.
        dead_copies: also write the projections that the release carries and never reads, equal to the live ones.
    """
    check_global_branch(global_branch)
    released = {}
    for name, tensor in state_dict.items():
        renamed = name.replace(".cross_attn.", ".attn2.").replace(".attn.", ".attn1.")
        if global_branch == "expected" and renamed.endswith(".attn1.to_out.0.weight"):
            tensor = tensor * 2
        projection = re.fullmatch(r"(.*\.attn[12]\.to_)([qkv])(\.weight|\.bias)", renamed)
        if projection is None:
            released[renamed] = tensor
            continue
        stem, part, kind = projection.groups()
        cross = stem.endswith(".attn2.to_")
        if cross or dead_copies:
            released[renamed] = tensor
        fused = ("kv" if dead_copies else "") if cross else "qkv"
        if fused and part == "v":
            siblings = [state_dict[f"{name.removesuffix(f'to_v{kind}')}to_{letter}{kind}"] for letter in fused]
            released[f"{stem}{fused}{kind}"] = torch.cat(siblings)
    return released


def check_global_branch(global_branch: str) -> None:
    """Raise a ValueError unless the choice is known."""
    if global_branch not in GLOBAL_BRANCHES:
        raise ValueError(f"global_branch={global_branch!r} is not known; choose among {list(GLOBAL_BRANCHES)}.")


def untold_by_shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `from_single_file` has to be given as `config` to load a released file of this model as it was."""
    told = {name: config[name] for name in ("sample_size", "mixer_options")}
    return {name: value for name, value in told.items() if value != RELEASED_CONFIG[name]}


def check_releasable(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting of a model that the released architecture does not have."""
    window = (config["mixer_options"] or {}).get("window", {})
    if isinstance(window, list):
        raise ValueError(
            f"mixer_options={config['mixer_options']!r} differ by layer, which the released format has not."
        )
    size = window.get("window_size", 4)
    wanted = {
        "attention_residual": True,
        "qk_norm": "rms_norm",
        "qk_norm_eps": 1e-10,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_classes": None,
        "feed_forward": "mlp",
        "mlp_ratio": 4.0,
    }
    for name, value in wanted.items():
        if config[name] != value:
            raise ValueError(f"{name}={config[name]!r} has no place in the released format, which has {value!r}.")
    if set(config["token_mixers"]) != {"window"} or not config["caption_channels"]:
        raise ValueError(
            f"token_mixers={tuple(config['token_mixers'])!r} and caption_channels={config['caption_channels']} do not "
            "both have a place in the released format, which has window attention and text."
        )
    interpolation_scale = max(config["sample_size"] // 64, 1)
    if config["interpolation_scale"] not in (None, interpolation_scale):
        raise ValueError(
            f"interpolation_scale={config['interpolation_scale']} has no place in the released format, which has "
            f"{interpolation_scale} at sample_size={config['sample_size']}."
        )
    sizes = config["use_additional_conditions"]
    if not (config["sample_size"] == 128 if sizes is None else sizes):
        raise ValueError("A model without use_additional_conditions has no place in the released format.")
    schedule = window.get("shift_schedule", "swin")
    if schedule not in ("cyclic", tuple(range(size)), list(range(size))):
        raise ValueError(f"shift_schedule={schedule!r} has no place in the released format, which shifts by 0, 1, ...")
    if window.get("relative_position_bias") or window.get("global_context"):
        raise ValueError("relative_position_bias and global_context have no place in the released format.")


def pixart_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LocalDiTTransformer2DModel` that make it a PixArt of this config, but for its mixers.

    Raises:
        ValueError: where the PixArt has a setting that this model has not.
    """
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    wanted = {
        "norm_type": "ada_norm_single",
        "attention_type": "default",
        "norm_elementwise_affine": False,
        "upcast_attention": False,
        "cross_attention_dim": heads * head_dim,
    }
    for name, value in wanted.items():
        if config[name] != value:
            raise ValueError(f"The PixArt has {name}={config[name]!r}, but this model can only be {value!r}.")
    same = (
        *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "dropout"),
        *("attention_bias", "sample_size", "patch_size", "activation_fn", "norm_eps", "interpolation_scale"),
        *("use_additional_conditions", "caption_channels"),
    )
    return {**{name: config[name] for name in same}, "qk_norm": None, "rope_theta": None}


def from_pixart_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a `PixArtTransformer2DModel` to this model's."""
    return {
        name.replace(".attn1.", ".attn.").replace(".attn2.", ".cross_attn."): tensor
        for name, tensor in state_dict.items()
    }


def load_pixart(source: str | os.PathLike | PixArtTransformer2DModel, **kwargs: Any) -> PixArtTransformer2DModel:
    """A PixArt transformer: given, or of a pipeline's or the transformer's own folder or Hub id."""
    if isinstance(source, PixArtTransformer2DModel):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"from_pixart was given a {type(source).__name__}; give a PixArtTransformer2DModel or its folder."
        )
    source = os.fspath(source)
    in_pipeline = "subfolder" not in kwargs and not os.path.isfile(os.path.join(source, "config.json"))
    place = {"subfolder": "transformer"} if in_pipeline else {}
    try:
        loaded: Any = PixArtTransformer2DModel.from_pretrained(source, output_loading_info=True, **place, **kwargs)
    except Exception as error:  # what is missing, damaged or of another model fails in many ways
        raise ValueError(
            f"{source!r} holds no PixArt transformer that can be loaded ({_first_line(error)}); give the folder or Hub "
            "id of a PixArt pipeline, or the transformer itself."
        ) from error
    pixart, info = loaded
    check_complete(source, {**info, "unexpected_keys": []})  # PixArt-alpha's file holds an embedding that nothing reads
    return pixart


def check_complete(source: str, info: Mapping[str, Any]) -> None:
    """Raise a ValueError where diffusers' loading information tells of missing or unknown tensors."""
    problems = {"lack": info["missing_keys"], "hold unknown": info["unexpected_keys"]}
    told = [f"{verb} {len(names)} tensor(s) ({min(names)}, ...)" for verb, names in problems.items() if names]
    if told:
        raise ValueError(
            f"The weights in {source} {' and '.join(told)}, so they are damaged or "
            "belong to another config.json; download or save both anew (a PixArt loads by from_pixart)."
        )


def check_names(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise a ValueError that lists every tensor that is missing, too much or of another shape."""
    missing = sorted(set(expected) - set(found))
    if len(missing) == len(expected):
        raise ValueError(
            f"{source} holds no tensor by a name of this model or of the released LocalDiT; it is of another model, or "
            "its names have a prefix."
        )
    unexpected = sorted(set(found) - set(expected))
    shapes = [
        f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if found[name].shape != expected[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(
            f"{source} does not fit the model that its shapes and the config describe. Tensors {'; '.join(told)}. "
            "Give the whole checkpoint, and as config= what its shapes cannot tell."
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
