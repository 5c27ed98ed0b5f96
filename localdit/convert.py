"""Convert checkpoints: python -m localdit.convert {to-diffusers,to-released,from-pixart} SOURCE TARGET."""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from localdit.command_line import DTYPES, Parser, run
from localdit.conversion import (
    GLOBAL_BRANCHES,
    check_releasable,
    from_released,
    is_released_format,
    read_state_dict,
    to_released,
    untold_by_shapes,
    write_state_dict,
)
from localdit.models.transformer_localdit import LocalDiTTransformer2DModel


def check_target(target: Path) -> None:
    """Raise a ValueError where there is something already, before any work."""
    if target.exists():
        raise ValueError(f"{target} exists; remove it or choose another name.")
    if blocking := next((parent for parent in target.parents if parent.is_file()), None):
        raise ValueError(f"{target} cannot be made, since {blocking} is a file; choose another name.")


def parse_json(name: str, text: str) -> dict:
    """The object that a JSON argument holds."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name} {text!r} is no JSON ({error}); give an object such as '{{}}'.") from None
    if not isinstance(value, dict):
        raise ValueError(f"--{name} {text!r} is no JSON object; give one such as '{{}}'.")
    return value


def common_dtype(state_dict: dict[str, torch.Tensor]) -> torch.dtype:
    """The precision in which every bit is kept: the one of all tensors, or fp32 where they differ."""
    stored = {tensor.dtype for tensor in state_dict.values()}
    return stored.pop() if len(stored) == 1 else torch.float32


def save_folder(model: LocalDiTTransformer2DModel, folder: Path) -> None:
    """Save a transformer's folder, which appears only when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(Path(temporary) / folder.name)
        os.replace(Path(temporary) / folder.name, folder)


def to_diffusers(arguments: argparse.Namespace) -> None:
    """Released format -> transformer folder."""
    check_target(arguments.target)
    config = parse_json("config", arguments.config)
    state_dict = read_state_dict(arguments.source)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else common_dtype(state_dict)
    if is_released_format(state_dict):
        dead = from_released(state_dict, arguments.global_branch)[1]
        parameters = sum(tensor.numel() for tensor in dead.values())
        print(f"{len(dead)} tensors ({parameters:,} parameters) that nothing reads are left out.")
    model = LocalDiTTransformer2DModel.from_single_file(
        state_dict, config=config, global_branch=arguments.global_branch, dtype=dtype
    )
    save_folder(model, arguments.target)
    print(f"{arguments.target} holds {model.num_parameters():,} parameters; load it with from_pretrained.")


def to_release(arguments: argparse.Namespace) -> None:
    """Transformer folder -> released format."""
    check_target(arguments.target)
    model = load_folder(arguments.source)
    check_releasable(model.config)
    released = to_released(model.state_dict(), arguments.global_branch, dead_copies=not arguments.no_dead_copies)
    write_state_dict(released, arguments.target)
    print(f"{arguments.target} holds {len(released)} tensors in the released format.")
    if untold := untold_by_shapes(model.config):
        print(f"It does not tell its settings; load it with config={json.dumps(untold)}.")


def from_pixart(arguments: argparse.Namespace) -> None:
    """PixArt folder or Hub id -> transformer folder."""
    check_target(arguments.target)
    model = LocalDiTTransformer2DModel.from_pixart(
        arguments.source,
        tuple(arguments.token_mixers),
        parse_json("mixer_options", arguments.mixer_options),
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
    )
    save_folder(model, arguments.target)
    print(f"{arguments.target} holds {model.num_parameters():,} parameters; load it with from_pretrained.")


def load_folder(source: str) -> LocalDiTTransformer2DModel:
    """The transformer of its own folder or of a pipeline's, in the precision it is stored in."""
    folder = Path(source)
    folder = folder if (folder / "config.json").is_file() else folder / "transformer"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source!r} holds no transformer (no config.json); give its folder or its pipeline's.")
    return LocalDiTTransformer2DModel.from_pretrained(folder, dtype=common_dtype(read_state_dict(folder)))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    branch = {"choices": GLOBAL_BRANCHES, "default": "expected", "help": "see localdit.conversion.from_released"}
    dtype = {"choices": sorted(DTYPES), "help": "of the written weights"}

    command = commands.add_parser("to-diffusers", help="the released LocalDiT's format -> a transformer folder")
    command.add_argument("source", help="a .safetensors or .pt file, an index of shards, or a folder with one")
    command.add_argument("target", type=Path, help="folder to write")
    command.add_argument("--config", default="{}", help="JSON of settings that the shapes cannot tell")
    command.add_argument("--global_branch", **branch)
    command.add_argument("--dtype", **dtype)
    command.set_defaults(run=to_diffusers)

    command = commands.add_parser("to-released", help="a transformer folder -> the released LocalDiT's format")
    command.add_argument("source", help="folder of a transformer or of its pipeline")
    command.add_argument("target", type=Path, help=".safetensors file to write")
    command.add_argument("--global_branch", **branch)
    command.add_argument("--no_dead_copies", action="store_true", help="leave out what the original code never reads")
    command.set_defaults(run=to_release)

    command = commands.add_parser("from-pixart", help="a PixArt -> a transformer folder")
    command.add_argument("source", help="folder or Hub id of a PixArt pipeline or transformer")
    command.add_argument("target", type=Path, help="folder to write")
    command.add_argument("--token_mixers", nargs="+", default=["full"], help="mixer names, tiled over the layers")
    command.add_argument("--mixer_options", default="{}", help="JSON of each mixer's options")
    command.add_argument("--dtype", **dtype)
    command.set_defaults(run=from_pixart)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run("localdit.convert", main)
