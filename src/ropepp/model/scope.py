"""Which keys the queries of a forward pass see, besides causality: the same for all layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropepp.model.cache import LayerCache
from ropepp.model.documents import Documents
from ropepp.model.kernels import attention
from ropepp.model.sequence import SequenceGroup


class AttentionScope:
    """Rows that are whole in this process, with the documents in them; with a cache, ids of these,
    (B, T) of the queries and (B, S) of the keys."""

    def __init__(
        self, documents: Documents | None = None, document_ids: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.documents = None if documents is None else documents.for_any_number()
        self.document_ids = document_ids

    def attend(
        self,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        cache: LayerCache | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention (B, T, H, D) over these keys and those of the cache, to which they are added;
        options as in `attention`."""
        if cache is not None:
            return self._attend_cached(q_BTHD, k_BTKD, v_BTKD, cache, **options)
        options |= {"cu_seqlens": self.documents, "document_ids": self.document_ids}
        return attention(q_BTHD, k_BTKD, v_BTKD, **options)

    # A cache grows with every token: what is compiled around this sees the same shapes each time.
    @torch.compiler.disable
    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, **options: Any
    ) -> Tensor:
        return self.attend(q, *cache.append(k, v), **options)


CAUSAL = AttentionScope()


class ContextParallelScope(AttentionScope):
    """Rows of T tokens, with ``documents``, of which this process has two pieces."""

    def __init__(self, sequence: SequenceGroup, documents: Documents | None, T: int) -> None:
        super().__init__(documents)
        self.sequence = sequence
        self.pieces = sequence.spans(T)
        self.bounds: Sequence[tuple[Documents | None, Documents | None]]
        self.bounds = sequence.boundaries(documents, T) if documents else [(None, None)] * 2

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
