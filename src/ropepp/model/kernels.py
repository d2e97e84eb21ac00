"""One attention function with named backends; it does not know which position encoding it serves.

Queries are (B, T, H, D), keys and values (B, S, K, D). Attention head h reads kv head ``h // (H /
K)``, so real and imaginary heads of one projection share keys and values in a single call.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.errors import InputError


@dataclass(frozen=True)
class Request:
    """What a backend is asked for, validated; shapes as in `attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    cu_seqlens: Tensor | None
    alibi_slopes: Tensor | None
    visible: Tensor | None
    scale: float


Backend = Callable[[Request], Tensor]


# Kernels choose their own parallelism and see shapes that depend on the documents: compiling
# through them means a recompilation for every new packing, and other losses.
@torch.compiler.disable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention.

    Args:
        q: Queries (B, T, H, D).
        k: Keys (B, S, K, D), with S >= T; K divides H.
        v: Values (B, S, K, D).
        causal: Whether query i sees only the keys up to S - T + i.
        cu_seqlens: Boundaries of documents in the flattened rows, (documents + 1,) int32 from 0 to
            B * T; tokens see their own document only. Needs S = T.
        alibi_slopes: (H,) float32; head h's scores lose ``slope_h * |distance|`` (ALiBi, arXiv
            2108.12409).
        visible: (B, T, S) bool, which keys a query may see besides causality, at least one. For
            cached rows; packed documents are faster by ``cu_seqlens``, and not both at once.
        scale: Factor of the scores; ``1 / sqrt(D)`` unless given.
        backend: One of `BACKENDS`, or "auto".

    Returns:
        (B, T, H, D) in the queries' dtype.

    Raises:
        InputError: Shapes do not fit, or the backend is unknown.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if k.shape != (B, S, K, D) or v.shape != k.shape or H % K or S < T:
        raise InputError(
            f"attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "needs (B, T, H, D) and twice (B, S, K, D) with S >= T and K dividing H"
        )
    if cu_seqlens is not None and S != T:
        raise InputError(f"cu_seqlens needs as many keys as queries, found {S} and {T}")
    if visible is not None and (cu_seqlens is not None or visible.shape != (B, T, S)):
        raise InputError(
            f"visible is {tuple(visible.shape)}; it must be {(B, T, S)}, and without cu_seqlens"
        )
    name = "sdpa" if backend == "auto" else backend
    if name not in BACKENDS:
        raise InputError(f"attention backend is {backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    return BACKENDS[name](Request(q, k, v, causal, cu_seqlens, alibi_slopes, visible, scale))


def reference(request: Request) -> Tensor:
    """The definition, in float32 with all scores in memory: what every other backend must agree
    with."""
    q, k, v = (x.float() for x in (request.q, request.k, request.v))
    if request.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * request.scale
    query, key = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    distance = query[:, None] - key[None, :]
    if request.alibi_slopes is not None:
        scores = scores - request.alibi_slopes.float()[:, None, None] * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if request.causal:
        hidden |= distance < 0
    if request.cu_seqlens is not None:
        document = torch.bucketize(key, request.cu_seqlens[1:], right=True)
        hidden |= document[:, None] != document[None, :]
    if request.visible is not None:
        hidden = hidden | ~request.visible.unsqueeze(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    return out.reshape(request.q.shape).to(request.q.dtype)


def sdpa(request: Request) -> Tensor:
    """torch's fused attention, on any device; packed documents by one call per run of equal
    lengths."""
    if request.cu_seqlens is None:
        return _sdpa_dense(request, request.q, request.k, request.v)
    runs = _runs(request.cu_seqlens)
    # One split instead of a slice per run: the gradient of a slice is a tensor of the whole size.
    parts = [
        x.flatten(0, 1).split([n * size for n, size in runs])
        for x in (request.q, request.k, request.v)
    ]
    outs = []
    for (n, size), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (n, size)) for x in qkv)
        outs.append(_sdpa_dense(request, q, k, v).flatten(0, 1))
    return torch.cat(outs).view(request.q.shape)


def _runs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Consecutive documents of one length as (number, length): full rows of a batch are one run."""
    runs: list[tuple[int, int]] = []
    for size in cu_seqlens.diff().tolist():
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0] + 1, size)
        else:
            runs.append((1, size))
    return runs


def _sdpa_dense(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask, causal = None, request.causal and T == S
    cut = request.causal and 1 < T < S
    if cut or request.alibi_slopes is not None or request.visible is not None:
        mask, causal = _bias(request, T, S, q), False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=request.scale,
        enable_gqa=G > 1,
    )
    return out.transpose(1, 2)


def _bias(request: Request, T: int, S: int, q: Tensor) -> Tensor:
    """What is added to the scores, (B or 1, H or 1, T, S): slopes, causal mask, hidden keys."""
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    bias = torch.zeros(1, T, S, device=q.device)
    if request.alibi_slopes is not None:
        bias = -request.alibi_slopes.float()[:, None, None] * distance.abs()
    if request.causal:
        bias = bias.masked_fill(distance < 0, -torch.inf)
    if request.visible is not None:
        bias = bias.masked_fill(~request.visible.unsqueeze(1), -torch.inf)
    return bias.to(q.dtype)


BACKENDS: dict[str, Backend] = {"reference": reference, "sdpa": sdpa}
