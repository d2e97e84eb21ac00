"""The rotation, and RoPE; variants that rotate differ from RoPE in their head layout alone.

Frequencies are f_j = theta^(-2j/R), j = 0 .. R/2 - 1, for the first R components of a head (R = D
unless `rotary_share` says less); the rotation by the angle position * f_j acts on the halves [a, b]
of these R components (RoPE, arXiv 2104.09864; half-split form).
"""

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
        # Here and not in `queries`: cached properties take a lock, where a compiler breaks off.
        self.period = layout.period
        self.step = layout.num_projections * len(self.period) // layout.num_heads

    def forward(self, q_BTPD: Tensor, k_BTKD: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """See `PositionLayer`; ``table`` is (cos, sin), each (B or 1, T, R/2) in float32."""
        cos, sin = (part.unsqueeze(-2) for part in table)
        return self.queries(q_BTPD, cos, sin), self.keys(k_BTKD, cos, sin)

    def keys(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated, rest = k.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        a, b = rotate(rotated, cos, sin)
        return torch.cat((a.to(k.dtype), b.to(k.dtype), rest), dim=-1)

    def queries(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One rotation for all phases; a turn by a multiple of 90 degrees copies its halves."""
        rotated, rest = q.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        wide_a, wide_b = (half.unflatten(-2, (-1, self.step)) for half in rotate(rotated, cos, sin))
        # Copies are cast once, not once for each head.
        narrow = wide_a.to(q.dtype), wide_b.to(q.dtype)
        rest = rest.unflatten(-2, (-1, self.step))
        pieces: list[Tensor] = []
        for head in self.period:
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
        if not isinstance(self.theta, int | float) or not self.theta > 0:
            raise InputError(f"theta is {self.theta!r:.80}; it must be a number above 0")
        if not 0 < self.rotary_share <= 1:
            raise InputError(
                f"rotary_share is {self.rotary_share}; it must be above 0 and at most 1"
            )

    def rotary_dim(self, head_dim: int) -> int:
        """Number of components that rotate (R); an `InputError` if they have no two halves."""
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
        frequencies = self.frequencies(config.head_dim, positions_BT.device)
        angles = positions_BT.unsqueeze(-1).float() * frequencies
        magnitude = self.scaling.magnitude if self.scaling else 1.0
        return magnitude * angles.cos(), magnitude * angles.sin()

    def build(self, config: ModelConfig, layer_index: int) -> PositionLayer:
        layout = self.layout(config.num_heads, config.num_kv_heads)
        return RotaryLayer(layout, config.head_dim, self.rotary_dim(config.head_dim))


def whole_share(share: float, count: int, name: str) -> int:
    """``share``, 0 to 1, of ``count``; an `InputError` if that is no whole number."""
    number = round(share * count)
    if not 0 <= share <= 1 or abs(share * count - number) > 0.01:
        allowed = ", ".join(f"{i}/{count}" for i in range(count + 1))
        raise InputError(f"{name} is {share}; of {count} heads it can be {allowed}")
    return number
