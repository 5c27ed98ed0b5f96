"""What the training command lines share: recipes and dotted overrides in, one sentence out where they do not fit."""

import difflib
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from typing import TypeVar

import torch
from jsonargparse import ArgumentParser

from localdit.command_line import INTERRUPTED, hide_loading_bars, keep_freed_memory
from train.stopping import STOPPED, Stopped

Config = TypeVar("Config")

LESS_MEMORY = (
    "lower batch_size and raise gradient_accumulation_steps, set gradient_checkpointing to true or mixed_precision to "
    "bf16; --dry_run true tells what a step takes."
)

# as jsonargparse says it of the command line and of a recipe
UNKNOWN = re.compile(r"(?:unrecognized arguments: --|Option ')(?P<name>[^' =]+)")


def parse(config_class: type[Config], program: str, arguments: list[str] | None = None) -> Config:
    """Read recipes and overrides into a config; raises a ValueError of one sentence for what does not fit it."""
    parser = ArgumentParser(prog=program, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a recipe; may be given several times, later ones win")
    parser.add_class_arguments(config_class, sub_configs=True)
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explained(str(error), list(parser.get_defaults(skip_validation=True).keys()))) from None
    namespace.pop("config", None)
    return config_class(**parser.instantiate(namespace).as_dict())


def explained(message: str, known: list[str]) -> str:
    """A parser's message as one sentence, with the settings whose names are nearest to an unknown one."""
    message = " ".join(message.replace("Parser key ", "").split())
    message = re.sub(r"a <class '(\w+)'>", r"\1", message).replace("Expected a typing.Literal", "Expected one of ")
    if message.strip() == "Unexpected config:":
        return "The recipe is empty; give one like those in train/recipes."
    unknown = UNKNOWN.search(message)
    near = nearest(unknown["name"], known) if unknown else []
    hint = f" did you mean {' or '.join(near)}?" if near else " python -m train --help lists all settings."
    return f"{message};{hint}" if unknown else message


def nearest(name: str, known: list[str]) -> list[str]:
    """The known dotted names, two at most, whose last parts are like the last part of `name`."""
    last = name.rpartition(".")[2]
    alike = [other for other in known if difflib.get_close_matches(last, [other.rpartition(".")[2]], cutoff=0.7)]
    return difflib.get_close_matches(name, alike, n=2, cutoff=0.5)


def first_sentence(error: BaseException) -> str:
    """What an error says, in one line; of one that a loader's worker raised, without the worker's traceback."""
    message = str(error)
    if message.startswith("Caught ") and "Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def run(program: str, main: Callable[[], None]) -> None:
    """Run a command line; what cannot work ends it with one sentence and exit code 2."""
    keep_freed_memory()
    hide_loading_bars()
    try:
        main()
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        print(f"{program}: {first_sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        print(f"{program}: {first_sentence(error).partition(' GPU ')[0].rstrip('.')}; {LESS_MEMORY}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
