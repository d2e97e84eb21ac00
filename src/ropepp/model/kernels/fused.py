"""torch's own fused attention and its cuDNN kernel; documents go by runs of equal lengths."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropepp.model.kernels.backend import Backend, Gradients, Request, Result, half_on_cuda
from ropepp.model.kernels.dense import CPU, PLAIN, Kernel, Rows
from ropepp.model.kernels.dense import CUDNN as CUDNN_KERNEL
from ropepp.model.kernels.flash import VARLEN

# Queries whose mask exists at a time, where there is one.
CHUNK = 1024
# Those of a GPU: cuDNN makes a plan for each new length, which takes longer than the attention.
ON_GPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# The kernel for so many queries a row.
Choice = Callable[[Request, int], Kernel]


class Part(NamedTuple):
    """A call of a kernel for some of a row's queries and some of its keys."""

    queries: slice
    keys: slice
    causal: bool = False  # as many keys as queries, and each sees those up to its own
    masked: bool = False


def _own(request: Request, T: int) -> Kernel:
    return CPU if request.q.device.type == "cpu" else PLAIN


def _cudnn(request: Request, T: int) -> Kernel:
    return CUDNN_KERNEL if T > 1 else PLAIN  # which has none for one query


def forward(request: Request, choice: Choice = _own) -> Result:
    if request.documents is None:
        return _rows(request, choice)
    results = [_rows(run, choice) for run, _ in _runs(request) if run.q.numel()]
    out = torch.cat([out.flatten(0, 1) for out, _ in results]).view(request.q.shape)
    logs = [log_sum for _, log_sum in results if log_sum is not None]
    return out, torch.cat(logs) if logs else None


def backward(
    request: Request, grad: Tensor, out: Tensor, log_sum: Tensor, choice: Choice = _own
) -> Gradients:
    if request.documents is None:
        return _rows_backward(request, choice, grad, out, log_sum)
    results = []
    for run, (d, o, log) in _runs(request, grad, out, log_sum.view(request.q.shape[:3])):
        found: tuple[Tensor, ...] = (run.q, torch.zeros_like(run.k), torch.zeros_like(run.v))
        if run.q.numel():
            found = _rows_backward(run, choice, d, o, log.flatten())
        results.append([x.flatten(0, 1) for x in found])
    d_q, d_k, d_v = (torch.cat(own) for own in zip(*results, strict=True))
    return d_q.view(request.q.shape), d_k.view(request.k.shape), d_v.view(request.v.shape)


def _runs(request: Request, *others: Tensor) -> Iterator[tuple[Request, list[Tensor]]]:
    """Consecutive documents of equal lengths as rows, with what ``others`` (B, T, ...) have for
    their queries; full rows of a batch are one run."""
    assert request.documents is not None
    assert request.documents_k is not None
    flat = [x.flatten(0, 1) for x in (request.q, *others)]
    flat_k = [x.flatten(0, 1) for x in (request.k, request.v)]
    start = start_k = 0
    sizes = zip(request.documents.lengths, request.documents_k.lengths, strict=True)
    for (size, size_k), run in groupby(sizes):
        n = len(list(run))
        end, end_k = start + n * size, start_k + n * size_k
        q, *own = (x[start:end].unflatten(0, (n, size)) for x in flat)
        k, v = (x[start_k:end_k].unflatten(0, (n, size_k)) for x in flat_k)
        yield replace(request, q=q, k=k, v=v, documents=None, documents_k=None), own
        start, start_k = end, end_k


def _rows(request: Request, choice: Choice) -> Result:
    """Attention of rows that are all alike."""
    T, S = request.q.shape[1], request.k.shape[1]
    if T == 1 and not request.needs_grad:
        return _one_query(request), None
    kernel, results = choice(request, T), []
    parts = _parts(request, kernel, T, S)
    for part in parts:
        rows = _rows_of(request, part)
        if request.needs_grad or kernel is not PLAIN:
            results.append(kernel.forward(rows))
        else:
            results.append((_torch(rows), rows.q.new_empty(0)))
    outs, logs = zip(*results, strict=True)
    if len(parts) == 1:
        out, log = outs[0], logs[0]
    elif parts[0].queries == parts[1].queries:
        # Each part has a softmax of its own, put together by their sums.
        share = (logs[1] - logs[0]).sigmoid().unsqueeze(-1)  # of the own keys
        log = torch.logaddexp(*logs)
        out = outs[0].to(share.dtype).lerp(outs[1].to(share.dtype), share).to(request.q.dtype)
    else:
        out, log = torch.cat(outs, dim=1), torch.cat([log.flatten() for log in logs])
    return out.contiguous(), log.flatten() if request.needs_grad else None


def _rows_backward(
    request: Request, choice: Choice, grad: Tensor, out: Tensor, log_sum: Tensor
) -> Gradients:
    (B, T, H, _), S = request.q.shape, request.k.shape[1]
    kernel = choice(request, T)
    parts = _parts(request, kernel, T, S)
    sums: list[Tensor] = []
    for part in parts:
        log = log_sum[B * H * part.queries.start : B * H * part.queries.stop]
        queries, keys = (slice(None), part.queries), (slice(None), part.keys)
        found = kernel.backward(_rows_of(request, part), grad[queries], out[queries], log)
        if len(parts) == 1:
            return found
        if not sums:  # several parts have the same keys, or queries
            wide = torch.promote_types(request.q.dtype, torch.float32)
            sums = [torch.zeros_like(x, dtype=wide) for x in (request.q, request.k, request.v)]
        for whole, where, x in zip(sums, (queries, keys, keys), found, strict=True):
            whole[where] += x
    d_q, d_k, d_v = (x.to(request.q.dtype) for x in sums)
    return d_q, d_k, d_v


def _rows_of(request: Request, part: Part) -> Rows:
    q, k, v = request.q[:, part.queries], request.k[:, part.keys], request.v[:, part.keys]
    return Rows(q, k, v, _mask(request, part), part.causal, request.scale)


def _parts(request: Request, kernel: Kernel, T: int, S: int) -> list[Part]:
    """The calls for rows of T queries and S keys."""
    queries, causal = slice(0, T), request.causal and T > 1
    masked = request.alibi_slopes is not None or request.document_ids is not None
    if not masked and not causal:
        return [Part(queries, slice(0, S))]
    if not masked and (kernel.causal or not request.needs_grad):
        if T == S:
            return [Part(queries, slice(0, S), causal=True)]
        if kernel is CPU:
            # Keys before the queries and the queries' own, neither of which needs a mask.
            own = Part(queries, slice(S - T, S), causal=True)
            return [Part(queries, slice(0, S - T)), own]
    # A mask for every few queries, over the keys that causality leaves them.
    found = []
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        seen = S - T + end if request.causal else S
        # Where the CPU's kernel hides the later keys, it skips them.
        square = kernel is CPU and request.causal and seen == end - start
        found.append(Part(slice(start, end), slice(0, seen), square, masked=True))
    return found


def _torch(rows: Rows) -> Tensor:
    """`scaled_dot_product_attention` without gradients."""
    q, k, v = (x.transpose(1, 2) for x in rows[:3])
    mask = rows.mask
    if mask is not None and q.is_cuda:  # its kernels there take the queries' dtype
        mask = mask.to(q.dtype)
    options: dict[str, Any] = {"is_causal": rows.causal, "scale": rows.scale}
    with sdpa_kernel(ON_GPU) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1], **options
        )
    return out.transpose(1, 2)


def _one_query(request: Request) -> Tensor:
    """One query a row, which sees all keys but those of other documents: the heads of a kv head
    take the place of positions, because the grouped call is several times slower on a CPU."""
    S, K = request.k.shape[1:3]
    rows = _rows_of(request, Part(slice(0, 1), slice(0, S), masked=True))
    mask = rows.mask
    if mask is not None:
        mask = mask.transpose(1, 2)  # (B or 1, 1, H or 1, S)
        if mask.shape[2] > 1:
            mask = mask.squeeze(1).unflatten(1, (K, -1))
    folded = rows.q.squeeze(1).unflatten(1, (K, -1)).transpose(1, 2)
    out = _torch(rows._replace(q=folded, mask=mask))
    return out.transpose(1, 2).flatten(1, 2).unsqueeze(1)


def _mask(request: Request, part: Part) -> Tensor | None:
    """What is added to the scores of a part's queries and keys, (B or 1, H or 1, queries, keys):
    what slopes take from them, and minus infinity for what a query must not see. The last key of a
    row is the last query's own, and a part's keys are from the first on."""
    if not part.masked:
        return None
    q, T, S, seen = request.q, request.q.shape[1], request.k.shape[1], part.keys.stop
    start, end = (S - T + i for i in (part.queries.start, part.queries.stop))
    own = torch.arange(start, end, device=q.device)
    distance = own[:, None] - torch.arange(seen, device=q.device)
    hidden: Tensor | None = None
    if request.causal and not part.causal and end - start > 1:
        hidden = (distance < 0)[None, None]
    if request.document_ids is not None:
        ids, ids_k = request.document_ids
        others = ids[:, None, part.queries, None] != ids_k[:, None, None, :seen]
        hidden = others if hidden is None else hidden | others
    if request.alibi_slopes is None and hidden is None:
        return None
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros((), dtype=wide, device=q.device)
    if request.alibi_slopes is not None:
        bias = -request.alibi_slopes.to(wide)[None, :, None, None] * distance.abs()
    return bias if hidden is None else torch.where(hidden, -torch.inf, bias)


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


def _has_flash(request: Request) -> bool:
    """Whether a GPU's kernel trains all runs at once; the plain one has all scores in memory."""
    return request.needs_grad and VARLEN.refuse(request) is None


def _sdpa(request: Request) -> Result:
    return VARLEN.forward(request) if _has_flash(request) else forward(request)


def _sdpa_backward(request: Request, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    own = VARLEN.backward if _has_flash(request) else None
    return (own or backward)(request, grad, out, log_sum)


SDPA = Backend("sdpa", lambda request: None, _sdpa, _sdpa_backward)
CUDNN = Backend(
    "cudnn", _refuse_cudnn, partial(forward, choice=_cudnn), partial(backward, choice=_cudnn)
)
