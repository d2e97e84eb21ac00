"""Everything that is a rotation: RoPE, RoPE++ EC and EH, head splits, any phases, partial rotary.

The variants differ in their head layout alone. Frequencies are f_j = theta^(-2j/R), j = 0 .. R/2 -
1, for the first R components of a head (R = D unless `rotary_share` says less); the rotation by the
angle position * f_j acts on the halves [a, b] of these R components (RoPE, arXiv 2104.09864;
half-split form).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.heads import HeadLayout, turn
from ropepp.model.positions.base import Position, PositionLayer, Table
from ropepp.model.positions.scaling import Scaling

REAL, IMAGINARY = 0.0, -90.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the halves [a, b] of x's last dimension: [a cos - b sin, b cos + a sin], float32."""
    a, b = x.float().chunk(2, dim=-1)
    return a * cos - b * sin, b * cos + a * sin


class RotaryLayer(PositionLayer):
    """Rotates queries and keys once, then gives every attention head its turned copy of a query."""

    def __init__(self, layout: HeadLayout, head_dim: int, rotary_dim: int) -> None:
        super().__init__()
        self.layout = layout
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim

    def forward(self, q_BTPD: Tensor, k_BTKD: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """See `PositionLayer`; ``table`` is (cos, sin), each (B or 1, T, R/2) in float32."""
        cos, sin = (part.unsqueeze(-2) for part in table)
        return self.queries(q_BTPD, cos, sin), self.keys(k_BTKD, cos, sin)

    def keys(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, rest = k.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        a, b = rotate(rotated, cos, sin)
        return torch.cat((a.to(k.dtype), b.to(k.dtype), rest), dim=-1)

    def queries(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One rotation for all phases: a turn by a multiple of 90 degrees is a copy of its
        halves."""
        period = self.layout.period
        step = self.layout.num_projections * len(period) // self.layout.num_heads
        rotated, rest = q.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        wide_a, wide_b = (half.unflatten(-2, (-1, step)) for half in rotate(rotated, cos, sin))
        narrow = (
            wide_a.to(q.dtype),
            wide_b.to(q.dtype),
        )  # copies are cast once, not once for each head
        rest = rest.unflatten(-2, (-1, step))
        pieces: list[Tensor] = []
        for head in period:
            i = head.projection
            a, b = narrow if head.phase % 90 == 0 else (wide_a, wide_b)
            pieces += [*turn(a[..., i, :], b[..., i, :], head.phase), rest[..., i, :]]
        heads = torch.cat([piece.to(q.dtype) for piece in pieces], dim=-1)
        return heads.view(*q.shape[:-2], self.layout.num_heads, q.shape[-1])


@dataclass(frozen=True)
class RoPE(Position):
    """Rotary position embedding: every projection attends once, with phase 0.

    Args:
        theta: Base of the frequencies.
        rotary_share: Share of each head's components that rotate; the rest carry no position.
        scaling: Context extension, if any.
    """

    theta: float = 10000.0
    rotary_share: float = 1.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise InputError(f"theta is {self.theta}; it must be above 0")
        if not 0 < self.rotary_share <= 1:
            raise InputError(
                f"rotary_share is {self.rotary_share}; it must be above 0 and at most 1"
            )

    def rotary_dim(self, head_dim: int) -> int:
        """Number of components that rotate (R).

        Raises:
            InputError: It is odd or zero, so that it has no two halves.
        """
        size = int(self.rotary_share * head_dim)
        if size % 2 or not size:
            raise InputError(
                f"{size} of {head_dim} head components would rotate "
                f"(rotary_share {self.rotary_share}): a rotation needs an even number, at least 2"
            )
        return size

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """Angles per position, (R/2,), float32 whatever the model's dtype."""
        size = self.rotary_dim(head_dim)
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        frequencies = 1.0 / self.theta**exponents
        return self.scaling.frequencies(frequencies) if self.scaling else frequencies

    def table(self, positions_BT: Tensor, config: ModelConfig) -> Table:
        angles = positions_BT.unsqueeze(-1).float() * self.frequencies(
            config.head_dim, positions_BT.device
        )
        magnitude = self.scaling.magnitude if self.scaling else 1.0
        return magnitude * angles.cos(), magnitude * angles.sin()

    def build(self, config: ModelConfig, layer_index: int) -> PositionLayer:
        layout = self.layout(config.num_heads, config.num_kv_heads)
        return RotaryLayer(layout, config.head_dim, self.rotary_dim(config.head_dim))


@dataclass(frozen=True)
class RoPEppEC(RoPE):
    """RoPE++ with equal cache: every projection attends twice, real and imaginary; heads double."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([(REAL, IMAGINARY)] * num_heads, num_kv_heads)


@dataclass(frozen=True)
class RoPEppEH(RoPE):
    """RoPE++ with equal heads: EC on half the projections and kv heads, so that the cache
    halves."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        if num_heads % 2 or num_kv_heads % 2:
            raise InputError(
                f"equal heads halves heads and kv heads: num_heads {num_heads} and "
                f"num_kv_heads {num_kv_heads} must both be even"
            )
        return HeadLayout.from_phases([(REAL, IMAGINARY)] * (num_heads // 2), num_kv_heads // 2)


@dataclass(frozen=True)
class HeadSplit(RoPE):
    """Some heads real, the others imaginary, each with a query projection of its own.

    The function class is exactly RoPE's, since a separate query matrix absorbs a constant turn: a
    null control, not a competitor.

    Args:
        imaginary_share: Share of the heads that are imaginary; must give a whole number of heads.
        interleaved: Whether the imaginary heads are spread evenly; otherwise they are the last
            ones.
    """

    imaginary_share: float = 0.5
    interleaved: bool = False

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        n = whole_share(self.imaginary_share, num_heads, "imaginary_share")
        if self.interleaved:
            imaginary = [(h + 1) * n // num_heads > h * n // num_heads for h in range(num_heads)]
        else:
            imaginary = [h >= num_heads - n for h in range(num_heads)]
        return HeadLayout.from_phases(
            [(IMAGINARY if i else REAL,) for i in imaginary], num_kv_heads
        )


@dataclass(frozen=True)
class ImaginaryOnly(RoPE):
    """Every head imaginary: RoPE in other coordinates, a null control like `HeadSplit`."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([(IMAGINARY,)] * num_heads, num_kv_heads)


@dataclass(frozen=True)
class PartialDoubling(RoPE):
    """EC for some of the projections: these have an imaginary copy, equally many under every kv
    head.

    Args:
        doubled_share: Share of the projections that attend twice; must give a whole number per kv
            head.
    """

    doubled_share: float = 0.5

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        doubled = whole_share(self.doubled_share, num_heads, "doubled_share")
        if doubled % num_kv_heads:
            raise InputError(
                f"doubled_share {self.doubled_share} doubles {doubled} of {num_heads} heads, which "
                f"do not divide over {num_kv_heads} kv heads: each must serve the same number"
            )
        group, own = num_heads // num_kv_heads, doubled // num_kv_heads
        phases = [(REAL, IMAGINARY) if p % group < own else (REAL,) for p in range(num_heads)]
        return HeadLayout.from_phases(phases, num_kv_heads)


@dataclass(frozen=True)
class Phases(RoPE):
    """Every projection attends once with each of the given phases; (0, -90) is EC.

    Args:
        phases: Phases in degrees.
    """

    phases: Sequence[float] = (REAL, IMAGINARY)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.phases:
            raise InputError("phases is empty; give at least one phase in degrees")
        object.__setattr__(self, "phases", tuple(float(phase) for phase in self.phases))

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([tuple(self.phases)] * num_heads, num_kv_heads)


@dataclass(frozen=True)
class Pythia(RoPE):
    """Partial rotary: RoPE on the first quarter of each head (Pythia, arXiv 2304.01373)."""

    rotary_share: float = 0.25


def whole_share(share: float, count: int, name: str) -> int:
    """``share`` of ``count`` as a whole number.

    Raises:
        InputError: The share is outside 0..1 or its number is not whole.
    """
    number = round(share * count)
    if not 0 <= share <= 1 or abs(share * count - number) > 0.01:
        allowed = ", ".join(f"{i}/{count}" for i in range(count + 1))
        raise InputError(f"{name} is {share}; of {count} heads it can be {allowed}")
    return number
