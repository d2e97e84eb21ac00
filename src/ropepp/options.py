"""What the argument parsers of several commands share."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

from ropepp.errors import InputError

TRUST = "ROPEPP_TRUST"  # names of the user's own modules, with commas: the command line's --trust


class Parser(ArgumentParser):
    """A command's parser, whose errors are as all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('ropepp ')}: {message}")


def seed(text: str) -> int:
    """A seed of random numbers, for argparse."""
    if not text.isdigit() or int(text) >= 1 << 63:
        raise ArgumentTypeError(f"it is {text}; allowed: whole numbers from 0 to below 2**63")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"it is {text}; allowed: whole numbers from 1 on")
    return int(text)
