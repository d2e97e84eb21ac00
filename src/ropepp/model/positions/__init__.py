"""Position encodings, one spec a variant. A new one, imported here, has a short name everywhere.

`base` is the contract, `rotary` the rotation with RoPE itself; `ropepp` are RoPE++'s variants, and
`controls` variants that can do no more than RoPE. `scaling` stretches the frequencies.
"""

from ropepp.model.positions.alibi import ALiBi
from ropepp.model.positions.base import Position, PositionLayer
from ropepp.model.positions.controls import HeadSplit, ImaginaryOnly
from ropepp.model.positions.fope import FoPE
from ropepp.model.positions.nope import NoPE
from ropepp.model.positions.pythia import Pythia
from ropepp.model.positions.ropepp import PartialDoubling, Phases, RoPEppEC, RoPEppEH
from ropepp.model.positions.rotary import RoPE
from ropepp.model.positions.scaling import PI, Scaling, YaRN

__all__ = [
    "PI", "ALiBi", "FoPE", "HeadSplit", "ImaginaryOnly", "NoPE", "PartialDoubling", "Phases",
    "Position", "PositionLayer", "Pythia", "RoPE", "RoPEppEC", "RoPEppEH", "Scaling", "YaRN",
]  # fmt: skip
