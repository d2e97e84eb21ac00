"""What the argument parsers of several commands share."""

from argparse import ArgumentTypeError

TRUST = "ROPEPP_TRUST"  # names of the user's own modules, with commas: the command line's --trust


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"it is {text}; allowed: whole numbers from 1 on")
    return int(text)
