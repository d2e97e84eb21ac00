"""What the argument parsers of several commands share."""

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"it is {text}; allowed: whole numbers from 1 on")
    return int(text)
