"""RoPE++: projections that attend twice: equal cache, equal heads, some of them, any phases."""

from collections.abc import Sequence
from dataclasses import dataclass

from ropepp.errors import InputError
from ropepp.model.heads import HeadLayout
from ropepp.model.positions.rotary import IMAGINARY, REAL, RoPE, whole_share


@dataclass(frozen=True)
class Repeating(RoPE):
    """Projections that attend more than once.

    Args:
        start_as_rope: Whether the output projection's columns are zero at first but for those of
            each projection's first real head, so that the model begins as the RoPE of its seed.
    """

    start_as_rope: bool = False

    def drawn(self, layout: HeadLayout) -> list[int]:
        if not self.start_as_rope:
            return super().drawn(layout)
        heads = reversed([*enumerate(layout.heads)])
        real = {head.projection: i for i, head in heads if head.phase % 360 == REAL}
        if len(real) < layout.num_projections:
            raise InputError(f"start_as_rope needs a phase of 0 in every projection, not {self}")
        return sorted(real.values())


@dataclass(frozen=True)
class RoPEppEC(Repeating):
    """RoPE++ with equal cache: every projection attends twice, real and imaginary; heads double."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([(REAL, IMAGINARY)] * num_heads, num_kv_heads)


@dataclass(frozen=True)
class RoPEppEH(Repeating):
    """RoPE++ with equal heads: EC on half the projections and kv heads; the cache halves."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        if num_heads % 2 or num_kv_heads % 2:
            raise InputError(
                f"equal heads halves heads and kv heads: num_heads {num_heads} and "
                f"num_kv_heads {num_kv_heads} must both be even"
            )
        return HeadLayout.from_phases([(REAL, IMAGINARY)] * (num_heads // 2), num_kv_heads // 2)


@dataclass(frozen=True)
class PartialDoubling(Repeating):
    """EC for some of the projections, equally many under every kv head.

    Args:
        doubled_share: Share of the projections that attend twice, a whole number per kv head.
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
class Phases(Repeating):
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
