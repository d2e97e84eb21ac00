"""Cross entropy from hidden states without the logits of all tokens.

A vocabulary of 128256 and 16 rows of 4096 tokens make 34 GB of float32 logits. Here a chunk of rows
at a time is multiplied out, and its gradient is computed in the same pass, while its logits are
there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.errors import InputError, at_least

IGNORE_INDEX = -100
LOSSES = ("chunked", "naive", "liger")


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    backend: str = "chunked",
) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight.T``, in float32.

    The value is the cross entropy alone, so that logs with and without ``z_loss`` compare; the
    gradient is that of the cross entropy plus ``z_loss`` times the sum over counted targets of
    ``logsumexp(logits) ** 2``, which keeps the logits from drifting (PaLM, arXiv 2204.02311).

    Products are taken in ``hidden``'s dtype; the loss and the gradient of ``weight`` accumulate in
    float32.

    Args:
        hidden: (..., M) float32 or bfloat16.
        weight: (V, M), cast to ``hidden``'s dtype.
        targets: (...) int64, ids in 0..V-1 or ``ignore_index``.
        ignore_index: Target that does not count.
        z_loss: Coefficient of the squared logsumexp; PaLM's is 1e-4.
        backend: One of `LOSSES`.

    Returns:
        Scalar, float32, differentiable once in ``hidden`` and ``weight``.

    Raises:
        InputError: The backend is unknown or does not run here, or ``z_loss`` is negative.
    """
    if backend not in LOSSES:
        raise InputError(f"loss backend is {backend!r}; allowed: {', '.join(LOSSES)}")
    at_least(0, z_loss=z_loss)
    if backend == "chunked":
        flat, ids, rows = hidden.flatten(0, -2), targets.flatten(), chunk_rows(hidden.is_cuda)
        return _ChunkedCrossEntropy.apply(flat, weight, ids, ignore_index, rows, z_loss)
    other = cross_entropy_sum_naive if backend == "naive" else cross_entropy_sum_liger
    return other(hidden, weight, targets, ignore_index, z_loss)


def cross_entropy_sum_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> Tensor:
    """The same by materialising all logits: the definition against which the others are tested."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float().flatten(0, -2)
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if not z_loss:
        return loss
    z = z_loss * (logits.logsumexp(dim=-1).square() * (targets != ignore_index)).sum()
    return loss + (z - z.detach())


def cross_entropy_sum_liger(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """The same by Liger-Kernel's fused Triton kernel (arXiv 2410.10989), on a GPU alone.

    What differs: with bfloat16 the gradient of ``weight`` is accumulated in float32 and then
    rounded to bfloat16 once, and the value is off by up to 0.4% of the term of ``z_loss``, which
    the kernel rounds to bfloat16 before it is taken off. A target outside the vocabulary is not
    noticed.

    Raises:
        InputError: The package is missing, or the tensors are on the CPU.
    """
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise InputError(
            "loss backend is 'liger', but the package liger-kernel is missing (extra liger); "
            "install it or choose chunked or naive"
        ) from error
    if not hidden.is_cuda:
        raise InputError(
            f"loss backend is 'liger', which needs CUDA tensors, but these are on {hidden.device}; "
            "choose chunked or naive"
        )
    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        # The kernel computes no gradient at all unless its first argument wants one.
        hidden = hidden.detach().requires_grad_()
    result = liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2),
        weight.to(hidden.dtype),
        targets.flatten(),
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        reduction="sum",
        return_z_loss=z_loss > 0,
        accum_dtype=torch.float32,
    )
    return result.loss - result.z_loss.detach().float() if z_loss else result


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's cross entropy, and whether its target is the likeliest token.

    Returns:
        (...) float32 in nats and (...) bool; 0 and False where there is no target.
    """
    flat, ids, w = hidden.flatten(0, -2), targets.flatten(), weight.to(hidden.dtype)
    rows = chunk_rows(hidden.is_cuda)
    losses, hits = [], []
    for h, target in zip(flat.split(rows), ids.split(rows), strict=True):
        logits = F.linear(h, w).float()
        losses.append(F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none"))
        hits.append((logits.argmax(dim=-1) == target) & (target != ignore_index))
    return torch.cat(losses).view(targets.shape), torch.cat(hits).view(targets.shape)


def chunk_rows(on_gpu: bool) -> int:
    """Rows whose logits exist at a time: enough to keep the device busy, few enough to keep their
    logits small."""
    return 2048 if on_gpu else 256


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        rows: int,
        z_loss: float,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for i in range(0, len(targets), rows):
            h, target = hidden[i : i + rows], targets[i : i + rows]
            counts = (target != ignore_index).unsqueeze(1)
            column = target.unsqueeze(1).where(counts, 0)
            logits = F.linear(h, w).float()
            log_probs = logits.log_softmax(dim=-1)
            log_likelihood = log_probs.gather(1, column)
            loss -= (log_likelihood * counts).sum()
            if not (need_hidden or need_weight):
                continue
            # What is as large as the logits is changed in place and let go as soon as possible.
            grad = log_probs.exp_()
            if z_loss:
                logsumexp = logits.gather(1, column) - log_likelihood
                grad.mul_(1 + 2 * z_loss * logsumexp)
            del logits, log_probs
            grad.scatter_add_(1, column, grad.new_full((), -1.0).expand_as(column))
            grad = grad.mul_(counts).to(h.dtype)
            if grad_hidden is not None:
                torch.mm(grad, w, out=grad_hidden[i : i + rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ h
            del grad
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
        return grad_hidden, grad_weight, None, None, None, None
