"""torch's own fused attention, on any device, its cuDNN kernel alone, and its flash attention over
documents of any lengths in one call."""

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropepp.model.kernels.backend import (
    HALF,
    Backend,
    Request,
    half_on_cuda,
    head_size,
    never,
    older_than,
)

# Queries whose mask exists at a time, where there is one.
CHUNK = 1024

Dense = Callable[[Request, Tensor, Tensor, Tensor], Tensor]


def sdpa(request: Request) -> Tensor:
    """`scaled_dot_product_attention`; packed documents by one call per run of equal lengths."""
    return _by_runs(request, _dense)


def cudnn(request: Request) -> Tensor:
    """The same with the cuDNN kernel alone, which compiles for each new length of documents."""
    return _by_runs(request, _dense_cudnn)


def varlen(request: Request) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; its causality is aligned at the last query and the
    last key of each document."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, bounds, bounds_k, longest, longest_k = request.flattened()
    options: dict[str, Any] = {
        "scale": request.scale,
        "window_size": (-1, 0) if request.causal else (-1, -1),
    }
    # Versions without the option take grouped heads as they are.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, **options)
    assert isinstance(out, Tensor)
    return out.view(request.q.shape)


def _by_runs(request: Request, dense: Dense) -> Tensor:
    if request.documents is None:
        return dense(request, request.q, request.k, request.v)
    runs = _runs(request)
    # One split instead of a slice per run: the gradient of a slice is a tensor of the whole size.
    qs = request.q.flatten(0, 1).split([n * size for n, size, _ in runs])
    ks, vs = (
        x.flatten(0, 1).split([n * size for n, _, size in runs]) for x in (request.k, request.v)
    )
    outs = []
    for (n, size, size_k), q, k, v in zip(runs, qs, ks, vs, strict=True):
        if size:
            k, v = (x.unflatten(0, (n, size_k)) for x in (k, v))  # noqa: PLW2901
            outs.append(dense(request, q.unflatten(0, (n, size)), k, v).flatten(0, 1))
    return torch.cat(outs).view(request.q.shape)


def _runs(request: Request) -> list[tuple[int, int, int]]:
    """Consecutive documents of equal lengths as (number, queries, keys): full rows of a batch are
    one run."""
    assert request.documents is not None
    assert request.documents_k is not None
    sizes = zip(request.documents.lengths, request.documents_k.lengths, strict=True)
    return [(len(list(run)), *size) for size, run in groupby(sizes)]


def _dense(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (B, T, H, D) over keys (B, S, K, D), all rows alike."""
    T, S = q.shape[1], k.shape[1]
    if T == 1:
        return _one_query(request, q, k, v)
    if request.alibi_slopes is not None or request.document_ids is not None:
        return _in_chunks(request, q, k, v)
    if not request.causal or T == S:
        return _call(request, q, k, v, None, is_causal=request.causal)
    if q.is_cuda and q.dtype in HALF:  # for other dtypes it would become a whole mask
        from torch.nn.attention.bias import causal_lower_right

        return _call(request, q, k, v, causal_lower_right(T, S))
    if q.device.type == "cpu" and not request.needs_grad:
        return _before_and_own(request, q, k, v)
    return _in_chunks(request, q, k, v)


def _dense_cudnn(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[1] == 1:  # a document of one token, for which it has no kernel
        return _one_query(request, q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _call(request, q, k, v, None, is_causal=request.causal)


def _call(
    request: Request,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool = False,
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=request.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _one_query(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query a row, which sees all keys but those of other documents: the heads of a kv head
    take the place of positions, because the grouped call is several times slower on a CPU."""
    S, K = k.shape[1:3]
    mask = _mask(request, torch.arange(S - 1, S, device=q.device), S)
    if mask is not None:
        mask = mask.transpose(1, 2)  # (B or 1, 1, H or 1, S)
        if mask.shape[2] > 1:
            mask = mask.squeeze(1).unflatten(1, (K, -1))
    out = F.scaled_dot_product_attention(
        q.squeeze(1).unflatten(1, (K, -1)),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=request.scale,
    )
    return out.flatten(1, 2).unsqueeze(1)


def _before_and_own(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys before the queries and the queries' own apart, neither of which needs a mask, put
    together by their normalisers; a mask takes up to a third longer."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    before = k.shape[2] - q.shape[2]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (out, log_sum), (own, own_log_sum) = (
        kernel(q, k[:, :, part], v[:, :, part], 0.0, is_causal, scale=request.scale)
        for part, is_causal in ((slice(before), False), (slice(before, None), True))
    )
    share = (own_log_sum - log_sum).sigmoid().unsqueeze(-1)  # of the own keys in the softmax
    return out.float().lerp(own.float(), share).to(q.dtype).transpose(1, 2)


def _in_chunks(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask and a call for every few queries, over the keys that causality leaves them: without
    gradients no matrix of all queries and keys exists."""
    T, S = q.shape[1], k.shape[1]
    outs, end = [], S - T
    for part in q.split(CHUNK, dim=1):
        start, end = end, end + part.shape[1]
        seen = end if request.causal else S
        mask = _mask(request, torch.arange(start, end, device=q.device), seen, start - (S - T))
        outs.append(_call(request, part, k[:, :seen], v[:, :seen], mask))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _mask(request: Request, position: Tensor, seen: int, first: int = 0) -> Tensor | None:
    """What the queries at some ``position`` (T,) among the keys see of the first ``seen``: bool, or
    numbers to be added to the scores if there are slopes; (B or 1, H or 1, T, seen).

    Args:
        request: Slopes, causality and document ids.
        position: Consecutive key indices of the queries' own tokens.
        seen: Number of keys.
        first: Index of the first of these queries among the request's.
    """
    distance = position[:, None] - torch.arange(seen, device=position.device)
    shown: Tensor | None = None
    if request.causal and len(position) > 1:
        shown = (distance >= 0)[None, None]
    if request.document_ids is not None:
        ids, ids_k = request.document_ids
        own = ids[:, None, first : first + len(position), None] == ids_k[:, None, None, :seen]
        shown = own if shown is None else shown & own
    if request.alibi_slopes is None:
        return shown
    bias = -request.alibi_slopes.float()[None, :, None, None] * distance.abs()
    bias = bias if shown is None else bias.masked_fill(~shown, -torch.inf)
    # Fused kernels of a GPU take the queries' dtype; those of the CPU add float32 to any scores.
    return bias.to(request.q.dtype) if request.q.is_cuda else bias


def _refuse_cudnn(request: Request) -> str | None:
    if reason := half_on_cuda(request):
        return reason
    square = request.q.shape[1] == request.k.shape[1]
    if request.causal and not (square and request.documents is request.documents_k):
        return "its causality is aligned for as many queries as keys"
    q, k, v = (x.transpose(1, 2) for x in (request.q, request.k, request.v))
    grouped = q.shape[1] != k.shape[1]
    if can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, request.causal, grouped)):
        return None
    return "cuDNN has no kernel for these shapes on this GPU"


def _refuse_varlen(request: Request) -> str | None:
    return half_on_cuda(request) or head_size(request, 8, 256) or older_than(request, 8, "Ampere")


SDPA = Backend("sdpa", never, sdpa)
CUDNN = Backend("cudnn", _refuse_cudnn, cudnn)
VARLEN = Backend("varlen", _refuse_varlen, varlen)
