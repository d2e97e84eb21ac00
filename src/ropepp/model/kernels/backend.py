"""What is asked of attention, what a backend is, and the reasons that several have to refuse a
request."""

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ropepp.errors import InputError

HALF = (torch.bfloat16, torch.float16)

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The last few results of a function, found again by the identity of the tensors among its
    arguments: all layers of a forward pass ask with the same boundaries.

    Args:
        size: Number of results that are kept.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._entries: dict[tuple[object, ...], tuple[tuple[object, ...], Value]] = {}

    def get(self, arguments: tuple[object, ...], make: Callable[[], Value]) -> Value:
        """The result for ``arguments``, made if it is not there."""
        # A version changes in place with its tensor; torch does not count for inference tensors.
        key = tuple(
            (id(x), 0 if x.is_inference() else x._version) if isinstance(x, Tensor) else x
            for x in arguments
        )
        if key not in self._entries:
            # With the arguments: a tensor that is gone would leave its identity to another.
            self._entries[key] = (arguments, make())
            if len(self._entries) > self.size:
                del self._entries[next(iter(self._entries))]
        return self._entries[key][1]


_LENGTHS: Recent[tuple[int, ...]] = Recent()


def lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Lengths of documents from boundaries (documents + 1,), known to the host; on a GPU this waits
    for the device, once for all layers.

    Raises:
        InputError: They do not begin at 0, or fall.
    """
    return _LENGTHS.get((cu_seqlens,), lambda: _lengths(cu_seqlens))


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    bounds = cu_seqlens.tolist()
    sizes = tuple(b - a for a, b in itertools.pairwise(bounds))
    if not sizes or bounds[0] != 0 or min(sizes) < 0:
        raise InputError(
            f"boundaries of documents are {bounds[:8]}{'...' if len(bounds) > 8 else ''}; "
            "they must begin at 0 and never fall"
        )
    return sizes


@dataclass(frozen=True)
class Request:
    """What a backend is asked for, validated; shapes as in `attention`. With ``cu_seqlens`` there
    is ``cu_seqlens_k`` too, the same tensor if queries and keys have the same boundaries."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    document_ids: tuple[Tensor, Tensor] | None
    scale: float

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def flattened(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        """As kernels of documents take it; rows that are not packed become documents of equal
        length.

        Returns:
            Queries (B * T, H, D), keys and values (B * S, K, D), boundaries of the documents in the
            queries and in the keys, int32, and the most queries and keys of a document.
        """
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        if self.cu_seqlens is not None and self.cu_seqlens_k is not None:
            bounds, bounds_k = self.cu_seqlens, self.cu_seqlens_k
            longest, longest_k = max(lengths(bounds)), max(lengths(bounds_k))
            return q, k, v, bounds.int(), bounds_k.int(), longest, longest_k
        B, T, S = *self.q.shape[:2], self.k.shape[1]
        rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
        return q, k, v, rows * T, rows * S, T, S


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Args:
        name: As in `BACKENDS`.
        refuse: Says in words why this backend cannot serve a request here, or None if it can. The
            reasons below are asked in turn: a package is imported only where it could serve.
        run: (B, T, H, D) in the queries' dtype for a request that is not refused.
    """

    name: str
    refuse: Callable[[Request], str | None]
    run: Callable[[Request], Tensor]


def never(request: Request) -> str | None:
    """Serves everything."""
    return None


def half_on_cuda(request: Request, slopes: bool = False) -> str | None:
    """What a kernel for half precision on a GPU refuses, with or without ALiBi."""
    if not request.q.is_cuda:
        return f"it needs CUDA tensors, and these are on {request.q.device}"
    if request.q.dtype not in HALF:
        dtype = str(request.q.dtype).removeprefix("torch.")
        return f"it needs bfloat16 or float16, and this is {dtype}"
    if request.alibi_slopes is not None and not slopes:
        return "it has no ALiBi slopes"
    return document_ids(request)


def document_ids(request: Request) -> str | None:
    return None if request.document_ids is None else "it takes no document ids of single keys"


def head_size(request: Request, multiple: int, most: int) -> str | None:
    """Refuses heads whose size is not a multiple or too large."""
    size = request.q.shape[-1]
    if size % multiple == 0 and size <= most:
        return None
    return f"it needs a head size in multiples of {multiple} up to {most}, and this is {size}"


def older_than(request: Request, major: int, name: str) -> str | None:
    """Refuses GPUs of a lower compute capability than that of generation ``name``."""
    found = torch.cuda.get_device_capability(request.q.device)
    if found[0] >= major:
        return None
    return (
        f"it needs a GPU of compute capability {major}.0 ({name}) or newer, and this has "
        f"{found[0]}.{found[1]}"
    )


@functools.cache
def load(module: str, package: str, extra: str, function: str) -> Any:
    """A module of an optional package, or a string that says why there is none.

    Args:
        module: What to import.
        package: Its name at the package index.
        extra: The extra of this project that installs it.
        function: What the module must have; packages may share their first name.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        found = None
    except Exception as error:  # built for another torch, say: whatever happens, it is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        return f"the package {package} is installed but fails: {reason}"
    if not hasattr(found, function):
        return f"the package {package} is missing: pip install 'ropepp[{extra}]'"
    return found
