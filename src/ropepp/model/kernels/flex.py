"""FlexAttention (arXiv 2412.05496): torch's generated kernel, for documents, causality, ALiBi."""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropepp.model.documents import Recent
from ropepp.model.kernels.backend import Backend, Request, Result, document_ids, older_than

if TYPE_CHECKING:  # the module loads torch's compiler, which takes a second or two
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
KINDS = 128  # of requests, for each of which there is a kernel

_SEEN: Recent[tuple[Tensor, "BlockMask"]] = Recent(4)


def flex(request: Request) -> Result:
    """torch's flex_attention, compiled on a GPU, with all scores in memory on a CPU."""
    q, k, v = request.q, request.k, request.v
    if request.documents is not None:
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    position, mask = _seen(request)
    kernel = _compiled() if q.is_cuda else _uncompiled
    out = kernel(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=_alibi(request.alibi_slopes, position),
        block_mask=mask,
        scale=request.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).reshape(request.q.shape), None


def _alibi(slopes: Tensor | None, position: Tensor) -> Callable[..., Tensor] | None:
    if slopes is None:
        return None
    slopes = slopes.detach().float()

    def lower(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (position[i] - j).abs()

    return lower


def _seen(request: Request) -> tuple[Tensor, "BlockMask"]:
    """Of each query the index (T,) of its own token among the keys, and the keys that it sees, by
    blocks: of all queries if documents are packed, else of one row; once for all layers."""
    T, S, device = request.q.shape[1], request.k.shape[1], request.q.device
    bounds, bounds_k = (
        None if own is None else own.boundaries for own in (request.documents, request.documents_k)
    )
    if bounds is not None:
        T, S = request.q.shape[0] * T, request.k.shape[0] * S

    def make() -> tuple[Tensor, "BlockMask"]:
        # Kept for later calls, which may want gradients although this one does not.
        with torch.inference_mode(False), torch.no_grad():
            index = torch.arange(T, device=device)
            position, first = index + (S - T), torch.zeros_like(index)
            end = first + S
            if bounds is not None and bounds_k is not None:
                document = torch.bucketize(index, bounds[1:].to(index), right=True)
                first, end = bounds_k.to(index)[document], bounds_k.to(index)[document + 1]
                position = index - bounds.to(index)[document + 1] + end
            last = position if request.causal else end - 1
            return position.int(), _blocks(first.int(), last.int(), S)

    return _SEEN.get((bounds, bounds_k, T, S, request.causal, device), make)


def _blocks(first: Tensor, last: Tensor, S: int) -> "BlockMask":
    """The mask by blocks, from the first and last of S keys that each query sees: a range, because
    documents are contiguous, and neither falls from one query to the next. Only the ranges at the
    blocks' edges count; torch's own function would look at every query and key."""
    from torch.nn.attention.flex_attention import BlockMask

    T, device = len(first), first.device
    begin = torch.arange(0, T, BLOCK, device=device)
    end = (begin + BLOCK - 1).clamp(max=T - 1)
    begin_k = torch.arange(0, S, BLOCK, device=device)
    end_k = begin_k + BLOCK - 1
    some = (first[begin, None] <= end_k) & (last[end, None] >= begin_k)
    whole = (first[end, None] <= begin_k) & (last[begin, None] >= end_k)
    whole &= (begin + BLOCK <= T)[:, None]

    def shows(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (first[i] <= j) & (j <= last[i])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=shows,
        seq_lengths=(T, S),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block of queries the number of its blocks of keys, and these before all others."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1).int()[None, None], order.int()[None, None]


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Static at first and dynamic from the second shape on.
    kernel = torch.compile(flex_attention)
    # Beyond its limit, which is 8, the compiler gives up, and all scores are in memory.
    strict = torch._dynamo.config.patch(recompile_limit=KINDS, fail_on_recompile_limit_hit=True)
    return strict(kernel)


def _uncompiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Without gradients, for which the CPU has no implementation."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q.detach(), k.detach(), v.detach(), **options)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _refuse(request: Request) -> str | None:
    if request.document_ids is not None:
        return document_ids(request)
    if request.q.is_cuda:
        if not has_triton():
            return "the package triton is missing, which comes with the CUDA builds of torch"
        if request.q.shape[-1] < 16:
            return f"it needs a head size of at least 16, and this is {request.q.shape[-1]}"
        return older_than(request, 8, "Ampere")
    if request.q.device.type != "cpu":
        return f"it needs tensors on CUDA or the CPU, and these are on {request.q.device}"
    return "on the CPU it has no gradient" if request.needs_grad else None


FLEX = Backend("flex", _refuse, flex)
