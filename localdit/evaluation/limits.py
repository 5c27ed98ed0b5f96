"""How much a command line may be asked for."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from localdit.command_line import counting_number


def counting_to(most: int) -> Callable[[str], int]:
    """The type of an option that counts something, up to `most`."""

    def number(text: str) -> int:
        if (value := counting_number(text)) > most:
            raise ArgumentTypeError(f"{text} is more than {most}; choose that or less")
        return value

    return number
