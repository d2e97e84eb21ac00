"""Position encodings, one spec a variant. Import a new one here and its short name works
everywhere."""

from ropepp.model.positions.base import Position, PositionLayer
from ropepp.model.positions.rotary import (
    HeadSplit,
    ImaginaryOnly,
    PartialDoubling,
    Phases,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
)

__all__ = [
    "HeadSplit",
    "ImaginaryOnly",
    "PartialDoubling",
    "Phases",
    "Position",
    "PositionLayer",
    "Pythia",
    "RoPE",
    "RoPEppEC",
    "RoPEppEH",
]
