"""Cross entropy from hidden states without the logits of all tokens.

A vocabulary of 128256 and 16 rows of 4096 tokens make 34 GB of float32 logits. Here a chunk of rows
at a time is multiplied out, and its gradient is computed while its logits are there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.model.kernels.flex import has_triton

IGNORE_INDEX = -100


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight.T``, in float32.

    The value is the cross entropy alone, so that logs with and without ``z_loss`` compare; the
    gradient is that of the cross entropy plus ``z_loss`` times the sum over counted targets of
    ``logsumexp(logits) ** 2``, which keeps the logits from drifting (PaLM, arXiv 2204.02311).

    Products are taken in ``hidden``'s dtype; the loss and the gradient of ``weight`` accumulate in
    float32. It is differentiable once in ``hidden`` (..., M), float32 or bfloat16, and ``weight``
    (V, M); ``targets`` (...) are int64, ids in 0..V-1 or ``ignore_index``, which does not count.
    """
    flat, ids = hidden.flatten(0, -2), targets.flatten()
    return _ChunkedCrossEntropy.apply(flat, weight, ids, ignore_index, z_loss)


def cross_entropy_sum_naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> Tensor:
    """The same by materialising all logits: the definition against which it is tested."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float().flatten(0, -2)
    targets = targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if not z_loss:
        return loss
    z = z_loss * (logits.logsumexp(dim=-1).square() * (targets != ignore_index)).sum()
    return loss + (z - z.detach())


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's cross entropy, (...) float32 in nats, and whether its target is
    the likeliest token, (...) bool; 0 and False where there is no target."""
    flat, ids, w = hidden.flatten(0, -2), targets.flatten(), weight.to(hidden.dtype)
    rows = chunk_rows(len(ids), len(w), w.element_size() + 8, w.is_cuda)
    losses, hits = [], []
    for h, target in zip(flat.split(rows), ids.split(rows), strict=True):
        logits = F.linear(h, w).float()
        losses.append(F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none"))
        hits.append((logits.argmax(dim=-1) == target) & (target != ignore_index))
    return torch.cat(losses).view(targets.shape), torch.cat(hits).view(targets.shape)


def chunk_rows(tokens: int, vocab_size: int, logit_bytes: int, on_gpu: bool) -> int:
    """Rows whose logits, of ``logit_bytes`` each, exist at a time: enough to keep the device busy,
    few enough for its memory; no small chunk at the end."""
    budget, most = (2**31, 8192) if on_gpu else (2**27, 512)
    most = min(max(budget // (vocab_size * logit_bytes), 64), most)
    return max(-(-tokens // max(-(-tokens // most), 1)), 1)


def cached_rows(vocab_size: int) -> int:
    """Rows whose logits in float32 a CPU's caches hold."""
    return max(2**20 * torch.get_num_threads() // (4 * vocab_size), 1)


def losses_and_gradient(
    logits: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> Tensor:
    """Each row's cross entropy; its gradient takes the place of the logits.

    ``logits`` are (N, V), ``targets`` (N,) int64, losses (N,) float32; the gradient is that of
    their sum with the term of ``z_loss``; rows of ``ignore_index`` have neither. All is computed in
    float32 and the gradient rounded once. A GPU has a kernel for it, `ropepp.model.softmax_kernel`.
    On a CPU a few rows at a time, as many as its cache holds, go through torch's softmax, which is
    faster than what its compiler makes of the formula.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and has_triton():
        from ropepp.model import softmax_kernel

        return softmax_kernel.losses_and_gradient(logits, targets, ignore_index, z_loss)
    ignored = targets == ignore_index
    column = targets.masked_fill(ignored, 0).unsqueeze(1)
    rows = len(logits) if logits.is_cuda else min(cached_rows(logits.shape[1]), len(logits))
    rows = max(rows, 1)
    wide = torch.empty(rows, logits.shape[1], device=logits.device)
    losses = []
    for part, at in zip(logits.split(rows), column.split(rows), strict=True):
        probs = wide[: len(part)].copy_(part)
        torch.softmax(probs, dim=-1, out=probs)
        likelihood = probs.gather(1, at)
        loss = -likelihood.log()
        if (likelihood < 1e-30).any():  # before it is rounded to nothing
            loss = part.float().logsumexp(dim=-1, keepdim=True) - part.gather(1, at)
        if z_loss:
            probs.mul_(1 + 2 * z_loss * (part.gather(1, at) + loss))
        probs.scatter_add_(1, at, probs.new_full((), -1.0).expand_as(at))
        part.copy_(probs)
        losses.append(loss.squeeze(1))
    logits.index_fill_(0, ignored.nonzero().squeeze(1), 0)
    return torch.cat(losses).masked_fill_(ignored, 0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        N, V = len(targets), len(w)
        rows = chunk_rows(N, V, hidden.element_size(), hidden.is_cuda)
        losses = hidden.new_empty(N, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        logits = hidden.new_empty(rows, V)
        for i in range(0, max(N, 1), rows):
            h, target = hidden[i : i + rows], targets[i : i + rows]
            grad = torch.mm(h, w.t(), out=logits[: len(h)])
            losses[i : i + rows] = losses_and_gradient(grad, target, ignore_index, z_loss)
            if grad_hidden is not None:
                torch.mm(grad, w, out=grad_hidden[i : i + rows])
            if need_weight:
                grad_weight = _add_product(grad_weight, grad, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward pass is refused by autograd, which counts changes.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight.mul_(grad)  # autograd casts it to what the weight takes
        return grad_hidden, grad_weight, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total``, float32, with ``a.T @ b`` added in place. A CPU has no product of bfloat16 in
    float32: there each is rounded, once a chunk, and their sum is not."""
    accumulates = a.dtype == torch.float32 or (a.is_cuda and a.dtype != torch.float64)
    wide: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(a.t(), b, **wide) if accumulates else (a.t() @ b).float()
    if accumulates:
        return torch.addmm(total, a.t(), b, out=total, **wide)
    # Part by part: torch first casts what it adds.
    rows = max(2**18 // b.shape[1], 1)
    for part, own in zip(total.split(rows), (a.t() @ b).split(rows), strict=True):
        part.add_(own)
    return total
