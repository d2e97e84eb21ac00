"""Bounds of settings, said in one way."""

import math

import pytest

from ropepp.errors import InputError, at_least


def test_a_bound() -> None:
    at_least(1, "run.", steps=1, rows=None, share=1.5)
    for value in (0, 0.999, -1, math.nan):
        with pytest.raises(InputError, match=rf"^run.steps is {value}; it must be at least 1$"):
            at_least(1, "run.", rows=2, steps=value)
