"""Where the matrices that write into the residual stream start, and how far a step moves them.

An encoding that doubles its heads doubles what the output projection of attention reads, and thus
changes the start and the step of what attention adds to the residual stream. These rules state both
for all variants alike, from the head layout, the sizes and the depth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ropepp.errors import InputError, at_least


@dataclass(frozen=True)
class ScaleRule:
    """A factor that follows from the head layout, the sizes and the depth.

    ``gain * (H / P) ** -heads * (N / M) ** -fan_in * (2 L) ** -depth`` for H attention heads, P
    query projections, N values that the matrix reads, hidden size M and L blocks, each of which
    adds to the residual stream twice. As maximal-update parametrisation has it (arXiv 2203.03466)
    fan_in is 0.5 for a deviation and 1 for a step; GPT-2's residual layers have depth 0.5 for the
    deviation.

    Args:
        gain: Factor besides the powers.
        heads: Power of the attention heads per projection by which it falls.
        depth: Power of twice the number of blocks by which it falls.
        fan_in: Power of the fan-in, in units of the hidden size, by which it falls.
    """

    gain: float = 1.0
    heads: float = 0.0
    depth: float = 0.0
    fan_in: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise InputError(f"{name} is {value}; it must be a finite number")
        at_least(0, gain=self.gain)

    def factor(self, heads_per_projection: float, fan_in: float, num_layers: int) -> float:
        """The factor for H / P, N / M and L."""
        sizes = heads_per_projection**-self.heads * fan_in**-self.fan_in
        return self.gain * sizes * (2 * num_layers) ** -self.depth


@dataclass(frozen=True)
class MatrixScale:
    """Where a matrix starts and how far it moves, relative to the model's other matrices.

    Args:
        std: Of its initial standard deviation, in units of ``init_std``.
        step: Of its learning rate, while weight decay stays what it is: as if it were used as c W
            under Adam, but without a trace in weights or exports.
    """

    std: ScaleRule = ScaleRule()
    step: ScaleRule = ScaleRule()

    def __post_init__(self) -> None:
        for name in ("std", "step"):
            given = getattr(self, name)
            if isinstance(given, Mapping):
                object.__setattr__(self, name, ScaleRule(**given))
