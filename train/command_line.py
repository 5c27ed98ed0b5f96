"""What the training command lines share: recipes and dotted overrides in, one sentence out where they do not fit."""

import sys
from collections.abc import Callable
from typing import TypeVar

from jsonargparse import ArgumentParser

from localdit.command_line import INTERRUPTED

Config = TypeVar("Config")


def parse(config_class: type[Config], program: str, arguments: list[str] | None = None) -> Config:
    """Read recipes and overrides into a config; what does not fit it ends the program with exit code 2."""
    parser = ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe; may be given several times, later ones win")
    parser.add_class_arguments(config_class, sub_configs=True)
    namespace = parser.parse_args(arguments)
    namespace.pop("config", None)
    return config_class(**parser.instantiate(namespace).as_dict())


def run(program: str, main: Callable[[], None]) -> None:
    """Run a command line; what cannot work ends it with one sentence and exit code 2."""
    try:
        main()
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
