"""From document ids to the boundaries that attention kernels understand."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Rows of packed documents.

    Attributes:
        cu_seqlens: Boundaries of the documents in the flattened rows, (documents + 1,) int32, from
            0 to B * T.
        order: For each row the order of tokens (B, T) in which its documents are contiguous, or
            None if they are already.
    """

    cu_seqlens: Tensor
    order: Tensor | None


def find_documents(document_ids_BT: Tensor) -> Documents:
    """Finds the documents of each row; equal ids in different rows are different documents.

    Padding (-1) forms documents of its own, so that nothing else sees it. Ids may come in any
    order: where a document is interrupted by another, `order` brings its tokens together and keeps
    their sequence.
    """
    runs = _starts(document_ids_BT)
    in_order, order = document_ids_BT.sort(dim=1, stable=True)
    sorted_runs = _starts(in_order)
    contiguous = bool(runs.sum() == sorted_runs.sum())
    starts = (runs if contiguous else sorted_runs).flatten().nonzero().flatten()
    end = starts.new_tensor([document_ids_BT.numel()])
    cu_seqlens = torch.cat((starts, end)).to(torch.int32)
    return Documents(cu_seqlens, None if contiguous else order)


def _starts(ids_BT: Tensor) -> Tensor:
    starts = torch.ones_like(ids_BT, dtype=torch.bool)
    starts[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    return starts
