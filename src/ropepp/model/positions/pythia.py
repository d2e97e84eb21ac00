"""Partial rotary."""

from dataclasses import dataclass

from ropepp.model.positions.rotary import RoPE


@dataclass(frozen=True)
class Pythia(RoPE):
    """RoPE on the first quarter of each head (Pythia, arXiv 2304.01373)."""

    rotary_share: float = 0.25
