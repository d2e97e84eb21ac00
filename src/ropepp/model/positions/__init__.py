"""Position encodings, one spec a variant. Import a new one here and its short name works
everywhere."""

from ropepp.model.positions.alibi import ALiBi
from ropepp.model.positions.base import Position, PositionLayer
from ropepp.model.positions.fope import FoPE
from ropepp.model.positions.nope import NoPE
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
from ropepp.model.positions.scaling import PI, Scaling, YaRN

__all__ = [
    "PI",
    "ALiBi",
    "FoPE",
    "HeadSplit",
    "ImaginaryOnly",
    "NoPE",
    "PartialDoubling",
    "Phases",
    "Position",
    "PositionLayer",
    "Pythia",
    "RoPE",
    "RoPEppEC",
    "RoPEppEH",
    "Scaling",
    "YaRN",
]
