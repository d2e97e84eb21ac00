"""Every variant in a size that is computed at once."""

from ropepp.model import ModelConfig
from ropepp.model import positions as variants
from ropepp.model.positions import Position

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48, init_std=0.3)

ALL = [
    kind()
    for kind in vars(variants).values()
    if isinstance(kind, type) and issubclass(kind, Position) and kind is not Position
]
