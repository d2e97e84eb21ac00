"""Context extension: changed frequencies, so that longer distances stay within what was trained.

Raising theta (NTK) needs no class here: it is the ``theta`` of every rotation.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from ropepp.errors import InputError, at_least


@dataclass(frozen=True)
class Scaling:
    """Leaves frequencies as they are; sub-classes change them.

    Args:
        factor: How many times the trained length the context should reach (F).
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, "scaling ", factor=self.factor)

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin, of queries and keys alike."""
        return 1.0

    def frequencies(self, frequencies: Tensor) -> Tensor:
        """Changed angles per position; same shape."""
        return frequencies


@dataclass(frozen=True)
class PI(Scaling):
    """Linear position interpolation, f / F (arXiv 2306.15595)."""

    def frequencies(self, frequencies: Tensor) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (arXiv 2309.00071): interpolates slow frequencies, keeps fast ones, sharpens attention.

    A frequency that turns r times within the original length is divided by F where r <= ``slow``,
    kept where r >= ``fast``, and blended linearly in r between.

    Args:
        original_length: Trained length in tokens.
        slow: Turns up to which a frequency is interpolated.
        fast: Turns from which it is kept.
    """

    original_length: int = 4096
    slow: float = 1.0
    fast: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_length < 1 or not 0 <= self.slow < self.fast:
            raise InputError(
                f"YaRN got original_length {self.original_length}, slow {self.slow}, "
                f"fast {self.fast}: needs a length of at least 1 and 0 <= slow < fast"
            )

    @property
    def magnitude(self) -> float:
        return 1.0 + 0.1 * math.log(self.factor)

    def frequencies(self, frequencies: Tensor) -> Tensor:
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = ((turns - self.slow) / (self.fast - self.slow)).clamp(0.0, 1.0)
        return (1 - keep) * frequencies / self.factor + keep * frequencies
