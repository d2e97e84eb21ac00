"""Cross entropy from hidden states without the logits of all tokens.

A vocabulary of 128256 and 16 rows of 4096 tokens make 34 GB of float32 logits. Here a chunk of rows
at a time is multiplied out, and its gradient is computed in the same pass, while its logits are
there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight.T``, in float32.

    Products are taken in ``hidden``'s dtype; the loss and the gradient of ``weight`` accumulate in
    float32.

    Args:
        hidden: (..., M) float32 or bfloat16.
        weight: (V, M), cast to ``hidden``'s dtype.
        targets: (...) int64, ids in 0..V-1 or ``ignore_index``.
        ignore_index: Target that does not count.
        chunk_rows: Rows whose logits exist at a time; by default what suits the device.

    Returns:
        Scalar, float32, differentiable once in ``hidden`` and ``weight``.
    """
    rows = chunk_rows or default_chunk_rows(hidden)
    return _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), ignore_index, rows
    )


def cross_entropy_sum_naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """The same by materialising all logits: the definition against which the other is tested."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )


@torch.no_grad()
def cross_entropy_and_hits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """For evaluation: the same sum, and the number of targets that are the likeliest token.

    Returns:
        Two scalars, float32 and int64.
    """
    hidden, targets, w = hidden.flatten(0, -2), targets.flatten(), weight.to(hidden.dtype)
    rows = chunk_rows or default_chunk_rows(hidden)
    loss, hits = hidden.new_zeros((), dtype=torch.float32), targets.new_zeros(())
    for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = F.linear(h, w).float()
        loss += F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        hits += ((logits.argmax(dim=-1) == target) & (target != ignore_index)).sum()
    return loss, hits


def default_chunk_rows(hidden: Tensor) -> int:
    """Enough rows to keep the device busy, few enough to keep their logits small."""
    return 2048 if hidden.is_cuda else 256


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for i in range(0, len(targets), rows):
            h, target = hidden[i : i + rows], targets[i : i + rows]
            log_probs = F.linear(h, w).float().log_softmax(dim=-1)
            counts = (target != ignore_index).unsqueeze(1)
            column = target.unsqueeze(1).where(counts, 0)
            loss -= (log_probs.gather(1, column) * counts).sum()
            if not (need_hidden or need_weight):
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(1, column, grad.new_full((), -1.0).expand_as(column))
            grad = grad.mul_(counts).to(h.dtype)
            if grad_hidden is not None:
                torch.mm(grad, w, out=grad_hidden[i : i + rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
