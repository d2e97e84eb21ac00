"""Which backend serves a request."""

import functools
import logging

from ropepp.errors import InputError
from ropepp.model.kernels.backend import HALF, Backend, Request
from ropepp.model.kernels.definition import REFERENCE
from ropepp.model.kernels.flash import FLASH2, FLASH4, VARLEN
from ropepp.model.kernels.flex import FLEX
from ropepp.model.kernels.fused import CUDNN, SDPA

log = logging.getLogger("ropepp.model.kernels")

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (REFERENCE, SDPA, CUDNN, VARLEN, FLASH2, FLASH4, FLEX)
}


def select(request: Request, backend: str | Backend) -> Backend:
    """The backend that serves a request; raises what `attention` does."""
    _check_shapes(request)
    _check_documents(request)
    if backend == "auto":
        return BACKENDS[choose(request)]
    chosen = backend if isinstance(backend, Backend) else BACKENDS.get(backend)
    if chosen is None:
        raise InputError(f"attention backend is {backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    reason = chosen.refuse(request)
    if reason is not None:
        able = [name for name, other in BACKENDS.items() if other.refuse(request) is None]
        raise InputError(
            f"attention backend {chosen.name!r} cannot serve {_kind(request)}: {reason}; these "
            f"can: auto, {', '.join(able)}"
        )
    return chosen


def choose(request: Request) -> str:
    """The backend that "auto" means, by device, dtype and what is asked; logged once a kind.

    On CUDA in half precision, packed documents go to flash4 if it is installed, else to varlen,
    rows to varlen; rows and documents of a whole row in training to cuDNN, which makes a plan for
    each new length. Slopes go to flash2 if it is installed, else to flex, which would compile anew
    for each length of a cache. One query a row and anything else goes to sdpa.
    """
    packed, preferred = request.documents is not None, []
    T, S = request.q.shape[1], request.k.shape[1]
    several = packed or T > 1 or request.needs_grad
    if request.q.is_cuda and request.q.dtype in HALF and request.document_ids is None:
        if request.alibi_slopes is not None:
            preferred = ["flash2", "flex"] if several else ["flash2"]
        elif request.documents is not None:
            preferred = ["flash4", "varlen"]
            if request.needs_grad and set(request.documents.lengths) == {T}:
                preferred.insert(0, "cudnn")
        elif several:
            preferred = ["cudnn", "varlen"] if request.needs_grad and T == S else ["varlen"]
    name = next((n for n in preferred if BACKENDS[n].refuse(request) is None), "sdpa")
    _announce(name, _kind(request))
    return name


@functools.cache
def _announce(name: str, kind: str) -> None:
    log.info("attention of %s: %s", kind, name)


def _kind(request: Request) -> str:
    """In words, for people."""
    what = "rows" if request.documents is None else "packed documents"
    if request.alibi_slopes is not None:
        what += " with ALiBi slopes"
    if request.document_ids is not None:
        what += " of several documents"
    return f"{what} in {str(request.q.dtype).removeprefix('torch.')} on {request.q.device.type}"


def _check_shapes(request: Request) -> None:
    (B, T, H, D), (S, K) = request.q.shape, request.k.shape[1:3]
    bounds, bounds_k = request.documents, request.documents_k
    shape, shape_v = request.k.shape, request.v.shape
    fits = shape == (B, S, K, D) and shape_v == shape and H % K == 0
    if not fits or (S < T and bounds is bounds_k):
        raise InputError(
            f"attention got q {(B, T, H, D)}, k {tuple(shape)}, v {tuple(shape_v)}: "
            "needs (B, T, H, D) and twice (B, S, K, D) with S >= T and K dividing H"
        )
    if bounds_k is not None and (bounds is None or bounds.host.shape != bounds_k.host.shape):
        found = "missing" if bounds is None else tuple(bounds.host.shape)
        raise InputError(
            f"cu_seqlens_k is {tuple(bounds_k.host.shape)} and cu_seqlens {found}; they bound the "
            "same documents"
        )
    if bounds is not None and bounds is bounds_k and S != T:
        raise InputError(
            f"cu_seqlens needs as many keys as queries or cu_seqlens_k, found {S} and {T}"
        )
    if request.document_ids is not None:
        shapes = tuple(tuple(ids.shape) for ids in request.document_ids)
        if bounds is not None or shapes != ((B, T), (B, S)):
            raise InputError(
                f"document_ids are {shapes}; they must be {((B, T), (B, S))}, without cu_seqlens"
            )


def _check_documents(request: Request) -> None:
    if request.documents is None or request.documents_k is None:
        return
    sizes, sizes_k = request.documents.lengths, request.documents_k.lengths
    for name, found, x in (
        ("cu_seqlens", sum(sizes), request.q),
        ("cu_seqlens_k", sum(sizes_k), request.k),
    ):
        total = x.shape[0] * x.shape[1]
        if found != total:
            raise InputError(
                f"{name} ends at {found}; it must end at the number of tokens in "
                f"the flattened rows, {total}"
            )
    if sizes is sizes_k:  # nothing to compare, once a layer
        return
    for number, (size, size_k) in enumerate(zip(sizes, sizes_k, strict=True)):
        if size and size_k < (size if request.causal else 1):
            raise InputError(
                f"document {number} has {size} queries and {size_k} keys; it needs at least as "
                "many keys, or one if not causal"
            )
