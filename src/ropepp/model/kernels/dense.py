"""Kernels for rows of equal lengths, each with its backward pass: what the backends that serve
documents run by run are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ropepp.model.kernels.backend import Gradients

aten = torch.ops.aten

_RANK = [3]  # dimensions of cuDNN's logarithms, of which some versions of torch have one more


@dataclass(frozen=True)
class Kernel:
    """Attention of queries (B, T, H, D) over keys and values (B, S, K, D).

    Args:
        forward: From queries, keys, values, a mask or None, whether it is causal, and the scale:
            output (B, T, H, D) and the logarithms of the softmax's sums, B * T * H of them. A mask
            is added to the scores, (B or 1, H or 1, T, S); a causal one has as many keys as
            queries.
        backward: From the gradient of the output, queries, keys, values, output, logarithms and
            the same options: gradients of queries, keys and values.
        causal: Whether there is a causal one; otherwise a mask says it.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    causal: bool = True


def _swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, D) to (B, H, T, D) and back."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
        *_swapped(q, k, v), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), log_sum.transpose(1, 2)


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Gradients:
    log_sum = log_sum.view(out.shape[:3]).transpose(1, 2)
    d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_swapped(grad, q, k, v, out), log_sum, 0.0, causal, attn_mask=mask, scale=scale
    )
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = aten._scaled_dot_product_cudnn_attention(
        *_swapped(q, k, v), mask, True, 0.0, causal, False, scale=scale
    )
    _RANK[:] = [log_sum.ndim]
    return out.transpose(1, 2), log_sum


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Gradients:
    B, T, H, _ = q.shape
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none
    d_q, d_k, d_v = aten._scaled_dot_product_cudnn_attention_backward(
        *_swapped(grad, q, k, v, out),
        log_sum.view((B, H, T, 1)[: _RANK[0]]),
        *(seed, seed, mask, None, None, T, k.shape[1], 0.0, causal),
        scale=scale,
    )
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """In float32, with all scores in memory."""
    scores = _scores(q, k, mask, scale)
    log_sum = scores.logsumexp(dim=-1)
    out = _unfolded((scores - log_sum.unsqueeze(-1)).exp() @ _heads(v), q)
    return out.to(q.dtype), log_sum.view(-1, q.shape[2], q.shape[1]).transpose(1, 2)


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Gradients:
    """As FlashAttention has it (arXiv 2205.14135, section 3.1), but all at once."""
    weights = _scores(q, k, mask, scale)
    log_sum = log_sum.view(out.shape[:3]).transpose(1, 2).reshape(*weights.shape[:3], 1)
    weights = weights.sub_(log_sum).exp_()
    folded = _folded(grad, k)
    own = (grad.to(folded.dtype) * out).sum(-1, keepdim=True)
    d_v = weights.transpose(-2, -1) @ folded
    d_scores = (folded @ _heads(v).transpose(-2, -1)).sub_(_folded(own, k)).mul_(weights)
    d_scores.mul_(scale)
    d_q = _unfolded(d_scores @ _heads(k), q)
    d_k = d_scores.transpose(-2, -1) @ _folded(q, k)
    return d_q.to(q.dtype), d_k.transpose(1, 2).to(k.dtype), d_v.transpose(1, 2).to(v.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, K, G * T, S), of which a kv head's heads stand one after another."""
    (B, T, H, _), S = q.shape, k.shape[1]
    scores = (_folded(q, k) @ _heads(k).transpose(-2, -1)) * scale
    if mask is not None:
        scores.view(B, H, T, S).add_(mask)
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
