"""Attention with linear biases (ALiBi, arXiv 2108.12409): scores fall with distance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ropepp.model.config import ModelConfig
from ropepp.model.positions.base import Position, PositionLayer, Table


class ALiBiLayer(PositionLayer):
    """Queries and keys as they are; the slopes go to the kernel."""

    def alibi_slopes(self, table: Table) -> Tensor | None:
        return table[0]


@dataclass(frozen=True)
class ALiBi(Position):
    """Head h's scores lose slope_h times the distance in tokens; position ids have no effect."""

    def table(self, positions_BT: Tensor, config: ModelConfig) -> Table:
        heads = self.layout(config.num_heads, config.num_kv_heads).num_heads
        slopes = torch.tensor(slopes_of(heads), dtype=torch.float32)
        return (slopes.to(positions_BT.device, non_blocking=True),)

    def build(self, config: ModelConfig, layer_index: int) -> PositionLayer:
        return ALiBiLayer()


def slopes_of(heads: int) -> list[float]:
    """2^(-8 (h + 1) / n) for n heads, a power of two; for other counts those of the next lower
    power, then every second one of the next higher."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return slopes + between[: heads - power]
