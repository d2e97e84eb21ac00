"""The one function. To torch it is one operator: what is compiled around it sees a single call
whose shapes do not depend on the documents, and the backward pass takes output and log-sum-exp from
the forward pass instead of running it again."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ropepp.model.documents import Documents
from ropepp.model.kernels.backend import Backend, Gradients, Request
from ropepp.model.kernels.registry import select

NOTHING = torch.empty(0)
Tensors = Sequence[Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | Documents | None = None,
    cu_seqlens_k: Tensor | Documents | None = None,
    alibi_slopes: Tensor | None = None,
    document_ids: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """Softmax attention, (B, T, H, D) in the queries' dtype. An `InputError` if shapes do not fit,
    or the backend is unknown or cannot serve this; it says which can.

    Args:
        q: Queries (B, T, H, D).
        k: Keys (B, S, K, D), with S >= T; K divides H. Values ``v`` have the same shape.
        causal: Whether query i sees only the keys up to S - T + i.
        cu_seqlens: Boundaries of documents in the flattened queries, (documents + 1,) int32 from 0
            to B * T, or `Documents`, with which a GPU is not waited for; tokens see their own
            document only. Needs S = T, or ``cu_seqlens_k``.
        cu_seqlens_k: Boundaries of the same documents in the flattened keys, (documents + 1,) int32
            from 0 to B * S; those of the queries unless given. The last query of a document is at
            its last key. A document may have no queries; with queries it has as many keys at
            least, or any if not causal.
        alibi_slopes: (H,) float32; head h's scores lose ``slope_h * |distance|`` (ALiBi, arXiv
            2108.12409). Constants: they get no gradient.
        document_ids: Ids (B, T) of the queries and (B, S) of the keys; a query sees the keys with
            its own id, at least one. For cached rows; packed documents are faster by
            ``cu_seqlens``, and not both at once.
        scale: Factor of the scores; ``1 / sqrt(D)`` unless given.
        backend: One of `BACKENDS`, "auto", see `choose`, or a backend of the caller's own.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    options = (causal, scale, needs_grad, backend)
    # Two backends have no backward pass of their own, and one of the caller's has no name by which
    # to find it; slopes on a GPU may be for flex; boundaries must be read.
    apart = backend in ("reference", "flex") or (alibi_slopes is not None and q.is_cuda)
    apart |= isinstance(backend, Backend) or isinstance(cu_seqlens, Tensor)
    if apart or not torch.compiler.is_compiling():
        return _served(q, k, v, cu_seqlens, cu_seqlens_k, alibi_slopes, document_ids, *options)
    documents: list[Any] = [own for own in (cu_seqlens, cu_seqlens_k) if own is not None]
    bounds = [x for own in documents for x in (own.boundaries, own.host)]
    return _attention(q, k, v, bounds, alibi_slopes, list(document_ids or ()), *options)[0]


# Kernels choose their own parallelism and see shapes that depend on the documents: compiling
# through them means a recompilation for every new packing, and other losses.
@torch.compiler.disable
def _served(
    q: Tensor, k: Tensor, v: Tensor, documents: Any, documents_k: Any, slopes: Any, ids: Any,
    causal: bool, scale: float, needs_grad: bool, backend: str | Backend,
) -> Tensor:  # fmt: skip
    own, keys = (Documents.of(x) if isinstance(x, Tensor) else x for x in (documents, documents_k))
    keys = own if keys is None else keys
    request = Request(q, k, v, causal, own, keys, slopes, ids, scale, needs_grad)
    chosen = select(request, backend)
    if chosen.backward is None or not needs_grad:
        return chosen.forward(request)[0]
    bare = replace(request, q=NOTHING, k=NOTHING, v=NOTHING)
    return _Eager.apply(q, k, v, bare, chosen)


class _Eager(torch.autograd.Function):
    """The operator below, not compiled: torch's wrapping takes longer than a small batch's pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bare: Request, chosen: Backend
    ) -> Tensor:
        out, log_sum = chosen.forward(replace(bare, q=q, k=k, v=v))
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.bare, ctx.chosen = bare, chosen  # without tensors that are saved, or may be offloaded
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        request = replace(ctx.bare, q=q, k=k, v=v)
        return *ctx.chosen.backward(request, grad.contiguous(), out, log_sum), None, None


# Attention, and the log-sum-exp of all queries and heads if there may be a backward pass.
# ``bounds`` are, where there are documents, their boundaries on the device and on the host, and
# where the keys' differ these too; ``ids`` are document ids of queries and keys, or nothing.
@torch.library.custom_op("ropepp::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensors,
    slopes: Tensor | None,
    ids: Tensors,
    causal: bool,
    scale: float,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    request = _request(q, k, v, bounds, slopes, ids, causal, scale, needs_grad)
    out, log_sum = select(request, backend).forward(request)
    return out, q.new_empty(0, dtype=torch.float32) if log_sum is None else log_sum


@_attention.register_fake
def _attention_shapes(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    needs_grad = arguments[-2]
    dtype = torch.promote_types(q.dtype, torch.float32) if needs_grad else torch.float32
    return q.new_empty(q.shape), q.new_empty(B * T * H if needs_grad else 0, dtype=dtype)


@torch.library.custom_op("ropepp::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensors,
    slopes: Tensor | None,
    ids: Tensors,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    request = _request(q, k, v, bounds, slopes, ids, causal, scale, True)
    chosen = select(request, backend)
    assert chosen.backward is not None
    found = chosen.backward(request, grad.contiguous(), out, log_sum)
    d_q, d_k, d_v = (x.contiguous() for x in found)
    return d_q, d_k, d_v


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, out: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, slopes, ids, ctx.causal, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(*output, q, k, v, slopes, *bounds, *ids)
    ctx.bounds, ctx.ids = len(bounds), len(ids)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    out, log_sum, q, k, v, slopes, *rest = ctx.saved_tensors
    bounds, ids = rest[: ctx.bounds], rest[ctx.bounds :]
    options = slopes, ids, ctx.causal, ctx.scale, ctx.backend
    found: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None:
        found = _backward(grad, out, log_sum, q, k, v, bounds, *options)
    return *found, [None] * ctx.bounds, None, [None] * ctx.ids, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)


def _request(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensors, slopes: Any, ids: Tensors, *rest: Any
) -> Request:
    documents = [Documents(host, own) for own, host in zip(bounds[::2], bounds[1::2], strict=True)]
    own, keys = (documents[0], documents[-1]) if documents else (None, None)
    pair = (ids[0], ids[1]) if ids else None
    causal, *options = rest
    return Request(q, k, v, causal, own, keys, slopes, pair, *options)
