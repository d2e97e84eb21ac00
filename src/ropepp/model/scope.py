"""Which keys the queries of a forward pass see, besides causality: the same for all layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.model.cache import LayerCache
from ropepp.model.kernels import attention
from ropepp.model.sequence import SequenceGroup


class AttentionScope:
    """Rows that are whole in this process.

    Args:
        cu_seqlens: Boundaries of documents, see `ropepp.model.kernels.attention`.
        documents: Document ids (B, T) of the queries and (B, S) of the keys; for cached rows.
    """

    def __init__(
        self, cu_seqlens: Tensor | None = None, documents: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.documents = documents

    # A cache grows with every token: what is compiled around this sees the same shapes each time.
    @torch.compiler.disable
    def attend(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        cache: LayerCache | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention (B, T, H, D) of this scope's queries over these keys and, before them, those of
        the cache, to which they are added; options as in `attention`."""
        if cache is not None:
            k_BTKD, v_BTKD = cache.append(k_BTKD, v_BTKD)
        return attention(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            cu_seqlens=self.cu_seqlens,
            document_ids=self.documents,
            **options,
        )


CAUSAL = AttentionScope()


class ContextParallelScope(AttentionScope):
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
    def attend(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        cache: LayerCache | None = None,
        **options: Any,
    ) -> Tensor:
        k_BSKD, v_BSKD = self.sequence.gather(k_BTKD, v_BTKD)
        queries = q_BTHD.split([b - a for a, b in self.pieces], dim=1)
        outs = []
        for q, (_, end), (bounds, bounds_k) in zip(queries, self.pieces, self.bounds, strict=True):
            # The piece's last query belongs to the last of these keys: causality is aligned there.
            k, v = k_BSKD[:, :end], v_BSKD[:, :end]
            outs.append(attention(q, k, v, cu_seqlens=bounds, cu_seqlens_k=bounds_k, **options))
        return torch.cat(outs, dim=1)


def find_documents(document_ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Finds the documents of each row; equal ids in different rows are different documents.

    Padding (-1) forms documents of its own, so that nothing else sees it. Ids may come in any
    order: where a document is interrupted by another, an order brings its tokens together and keeps
    their sequence.

    Returns:
        Boundaries of the documents in the flattened rows, (documents + 1,) int32, from 0 to B * T,
        and for each row the order of tokens (B, T) in which its documents are contiguous, or None
        if they are already.
    """
    runs = _starts(document_ids_BT)
    in_order, order = document_ids_BT.sort(dim=1, stable=True)
    sorted_runs = _starts(in_order)
    contiguous = bool(runs.sum() == sorted_runs.sum())
    starts = (runs if contiguous else sorted_runs).flatten().nonzero().flatten()
    end = starts.new_tensor([document_ids_BT.numel()])
    cu_seqlens = torch.cat((starts, end)).to(torch.int32)
    return cu_seqlens, None if contiguous else order


def _starts(ids_BT: Tensor) -> Tensor:
    return F.pad(ids_BT.diff(dim=1) != 0, (1, 0), value=True)
