"""Null controls: imaginary heads with projections of their own, RoPE in other coordinates."""

from dataclasses import dataclass

from ropepp.model.heads import HeadLayout
from ropepp.model.positions.rotary import IMAGINARY, REAL, RoPE, whole_share


@dataclass(frozen=True)
class HeadSplit(RoPE):
    """Some heads real, the others imaginary, each with a query projection of its own.

    The function class is exactly RoPE's, since a separate query matrix absorbs a constant turn: a
    null control, not a competitor.

    Args:
        imaginary_share: Share of the heads that are imaginary; must give a whole number of heads.
        interleaved: Whether imaginary heads are spread evenly; otherwise they are the last.
    """

    imaginary_share: float = 0.5
    interleaved: bool = False

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        n = whole_share(self.imaginary_share, num_heads, "imaginary_share")
        if self.interleaved:
            imaginary = [(h + 1) * n // num_heads > h * n // num_heads for h in range(num_heads)]
        else:
            imaginary = [h >= num_heads - n for h in range(num_heads)]
        phases = [(IMAGINARY if i else REAL,) for i in imaginary]
        return HeadLayout.from_phases(phases, num_kv_heads)


@dataclass(frozen=True)
class ImaginaryOnly(RoPE):
    """Every head imaginary: RoPE in other coordinates, a null control like `HeadSplit`."""

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([(IMAGINARY,)] * num_heads, num_kv_heads)
