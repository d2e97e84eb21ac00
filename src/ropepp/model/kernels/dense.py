"""Kernels for rows of equal lengths, with backward passes: parts of the backends in `fused`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropepp.model.kernels.backend import Gradients

aten = torch.ops.aten

_RANK = [3]  # dimensions of cuDNN's logarithms, of which some versions of torch have one more


class Rows(NamedTuple):
    """Attention of queries (B, T, H, D) over keys and values (B, S, K, D): ``mask`` is added to the
    scores, (B or 1, H or 1, T, S); a causal one has as many keys as queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


@dataclass(frozen=True)
class Kernel:
    """A way to compute it: ``forward`` gives the output (B, T, H, D) and B * T * H logarithms of
    the softmax's sums; ``backward``, of rows, the output's gradient, output and logarithms, the
    gradients of queries, keys and values. If it is not ``causal``, a mask says it."""

    forward: Callable[[Rows], tuple[Tensor, Tensor]]
    backward: Callable[[Rows, Tensor, Tensor, Tensor], Gradients]
    causal: bool = True


def _swapped(*tensors: Tensor) -> Any:
    """(B, T, H, D) to (B, H, T, D) and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _cpu_forward(rows: Rows) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_flash_attention_for_cpu(
        *_swapped(*rows[:3]), 0.0, rows.causal, attn_mask=rows.mask, scale=rows.scale
    )
    return _swapped(*found)


def _cpu_backward(rows: Rows, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    log_sum = log_sum.view(out.shape[:3]).transpose(1, 2)
    options = {"attn_mask": rows.mask, "scale": rows.scale}
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_swapped(grad, *rows[:3], out), log_sum, 0.0, rows.causal, **options
    )
    return _swapped(*found)


def _cudnn_forward(rows: Rows) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = aten._scaled_dot_product_cudnn_attention(
        *_swapped(*rows[:3]), rows.mask, True, 0.0, rows.causal, False, scale=rows.scale
    )
    _RANK[:] = [log_sum.ndim]
    return out.transpose(1, 2), log_sum


def _cudnn_backward(rows: Rows, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    q, k, v, mask, causal, scale = rows
    B, T, H, _ = q.shape
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none
    found = aten._scaled_dot_product_cudnn_attention_backward(
        *_swapped(grad, q, k, v, out),
        log_sum.view((B, H, T, 1)[: _RANK[0]]),
        *(seed, seed, mask, None, None, T, k.shape[1], 0.0, causal),
        scale=scale,
    )
    return _swapped(*found)


def _plain_forward(rows: Rows) -> tuple[Tensor, Tensor]:
    """In float32, with all scores in memory."""
    q, scores = rows.q, _scores(rows)
    log_sum = scores.logsumexp(dim=-1)
    out = _unfolded((scores - log_sum.unsqueeze(-1)).exp() @ _heads(rows.v), q)
    return out.to(q.dtype), log_sum.view(-1, q.shape[2], q.shape[1]).transpose(1, 2)


def _plain_backward(rows: Rows, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    """As FlashAttention has it (arXiv 2205.14135, section 3.1), but all at once."""
    q, k, v = rows[:3]
    weights = _scores(rows)
    log_sum = log_sum.view(out.shape[:3]).transpose(1, 2).reshape(*weights.shape[:3], 1)
    weights = weights.sub_(log_sum).exp_()
    folded = _folded(grad, k)
    own = (grad.to(folded.dtype) * out).sum(-1, keepdim=True)
    d_v = weights.transpose(-2, -1) @ folded
    d_scores = (folded @ _heads(v).transpose(-2, -1)).sub_(_folded(own, k)).mul_(weights)
    d_scores.mul_(rows.scale)
    d_q = _unfolded(d_scores @ _heads(k), q)
    d_k = d_scores.transpose(-2, -1) @ _folded(q, k)
    return d_q.to(q.dtype), d_k.transpose(1, 2).to(k.dtype), d_v.transpose(1, 2).to(v.dtype)


def _scores(rows: Rows) -> Tensor:
    """(B, K, G * T, S), of which a kv head's heads stand one after another."""
    (B, T, H, _), S = rows.q.shape, rows.k.shape[1]
    scores = (_folded(rows.q, rows.k) @ _heads(rows.k).transpose(-2, -1)) * rows.scale
    if rows.mask is not None:
        scores.view(B, H, T, S).add_(rows.mask)
    return scores


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).to(_wide(x))


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """(B, T, H, ...) as (B, K, G * T, ...), so that a kv head's heads share one product."""
    return x.transpose(1, 2).to(_wide(x)).unflatten(1, (k.shape[2], -1)).flatten(2, 3)


def _unfolded(x: Tensor, like: Tensor) -> Tensor:
    B, T, H, D = like.shape
    return x.reshape(B, H, T, D).transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDNN = Kernel(_cudnn_forward, _cudnn_backward)
PLAIN = Kernel(_plain_forward, _plain_backward, causal=False)
