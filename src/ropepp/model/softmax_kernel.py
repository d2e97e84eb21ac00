"""Losses and their gradient from logits as one Triton kernel, for GPUs.

Imported late: the package triton comes with the CUDA builds of torch alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # eight logits a thread: one load of 16 bytes in bfloat16


def losses_and_gradient(
    logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """See `ropepp.model.loss`; a target outside the vocabulary gives NaN: nothing is waited for."""
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _rows[(rows,)](
            logits, targets, losses, logits.stride(0), ignore_index, z_loss, V, BLOCK, num_warps=16
        )
    return losses


@triton.jit
def _rows(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    ignore_index: tl.tensor,
    z_loss: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: its logsumexp in one reading (arXiv 1805.02867), its gradient in a second, from the
    end, which caches still have."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target != ignore_index
    inside = counts & (target >= 0) & (target < V)
    # Before the gradient takes its place; the sums below wait for all threads.
    likely = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)

    columns = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
        # One exponential for both cases: that of the lower of the two over the higher.
        lower = tl.exp(-tl.abs(x - top))
        total = tl.where(x > top, total * lower + 1.0, total + lower)
        top = tl.maximum(top, x)
    highest = tl.max(top, 0)
    logsumexp = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))

    tl.store(losses + row, tl.where(counts, logsumexp - likely, 0.0))
    factor = 1.0 + 2.0 * z_loss * logsumexp
    last: tl.constexpr = (V - 1) // BLOCK * BLOCK
    for start in range(0, V, BLOCK):
        at = last - start + columns
        x = tl.load(logits + at, mask=at < V, other=0.0).to(tl.float32)
        grad = tl.exp(x - logsumexp) * factor - tl.where(at == target, 1.0, 0.0)
        grad = tl.where(counts, grad, 0.0)
        tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < V)
