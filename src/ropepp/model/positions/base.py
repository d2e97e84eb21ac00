"""What a position encoding is to the rest of the model."""

from dataclasses import dataclass

from torch import Tensor, nn

from ropepp.model.config import ModelConfig
from ropepp.model.heads import HeadLayout

Table = tuple[Tensor, ...]


class PositionLayer(nn.Module):
    """A layer's part of an encoding: tensors in, tensors out. This one leaves them as they are."""

    def forward(self, q_BTPD: Tensor, k_BTKD: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """Encodes projected queries and keys: gives queries (B, T, H, D), keys (B, T, K, D)."""
        return q_BTPD, k_BTKD

    def alibi_slopes(self, table: Table) -> Tensor | None:
        """Slopes (H,) by which the kernel lowers scores with distance, if the encoding has any."""
        return None


@dataclass(frozen=True)
class Position:
    """A position encoding as a spec of plain values; sub-classes are the variants.

    A variant says which heads there are (`layout`), what depends on positions alone and is computed
    once for all layers (`table`), and what a layer does with it (`build`).
    """

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        """The attention heads made from a plain model's head counts."""
        return HeadLayout.from_phases([(0.0,)] * num_heads, num_kv_heads)

    def drawn(self, layout: HeadLayout) -> list[int]:
        """The attention heads whose columns of the output projection do not begin as zero."""
        return list(range(layout.num_heads))

    def table(self, positions_BT: Tensor, config: ModelConfig) -> Table:
        """Float32 tensors that every layer gets, for positions (B, T) or (1, T), int64."""
        return ()

    def build(self, config: ModelConfig, layer_index: int) -> PositionLayer:
        """The module of layer ``layer_index``; the place of per-layer state."""
        return PositionLayer()
