"""Which keys the queries of a forward pass see, besides causality: the same for all layers."""

from typing import Any

import torch
from torch import Tensor

from ropepp.model.kernels import attention
from ropepp.model.sequence import SequenceGroup


class View:
    """Rows that are whole in this process.

    Args:
        cu_seqlens: Boundaries of documents, see `ropepp.model.kernels.attention`.
        visible: (B, T, S) which keys a query may see; for cached rows.
    """

    def __init__(self, cu_seqlens: Tensor | None = None, visible: Tensor | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.visible = visible

    @torch.compiler.disable
    def attend(self, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, **options: Any) -> Tensor:
        """Attention (B, T, H, D) of this view's queries; options as in `attention`."""
        return attention(
            q_BTHD, k_BSKD, v_BSKD, cu_seqlens=self.cu_seqlens, visible=self.visible, **options
        )


class SharedView(View):
    """Rows of T tokens of which this process has two pieces.

    Args:
        sequence: The processes that share them.
        cu_seqlens: Boundaries of documents in the whole rows.
        B: Rows.
        T: Tokens in a whole row.
    """

    def __init__(self, sequence: SequenceGroup, cu_seqlens: Tensor | None, B: int, T: int) -> None:
        super().__init__(cu_seqlens)
        self.sequence = sequence
        self.pieces = sequence.spans(T)
        self.bounds: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.pieces)
        if cu_seqlens is not None:
            self.bounds = list(sequence.boundaries(cu_seqlens, B, T))

    @torch.compiler.disable
    def attend(self, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, **options: Any) -> Tensor:
        k_BSKD, v_BSKD = self.sequence.gather(k_BSKD, v_BSKD)
        queries = q_BTHD.split([b - a for a, b in self.pieces], dim=1)
        outs = []
        for q, (_, end), (bounds, bounds_k) in zip(queries, self.pieces, self.bounds, strict=True):
            # The piece's last query belongs to the last of these keys: causality is aligned there.
            k, v = k_BSKD[:, :end], v_BSKD[:, :end]
            outs.append(attention(q, k, v, cu_seqlens=bounds, cu_seqlens_k=bounds_k, **options))
        return torch.cat(outs, dim=1)
