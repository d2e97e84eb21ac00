"""What is asked of attention, what a backend is, and the reasons that several have to refuse."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropepp.model.documents import Documents

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Request:
    """What a backend is asked for, validated; shapes as in `attention`. With ``documents`` there
    are ``documents_k`` too, the same object if queries and keys have the same boundaries."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    documents: Documents | None
    documents_k: Documents | None
    alibi_slopes: Tensor | None
    document_ids: tuple[Tensor, Tensor] | None
    scale: float
    needs_grad: bool = False  # whether a backward pass may follow

    def __post_init__(self) -> None:
        # Kernels take it for granted that the components of a head are neighbours in memory.
        for name in ("q", "k", "v"):
            if (x := getattr(self, name)).stride(-1) != 1:
                object.__setattr__(self, name, x.contiguous())

    def flattened(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        """As kernels of documents take it: queries (B * T, H, D), keys and values (B * S, K, D),
        boundaries of the documents in the queries and in the keys, int32, and the most queries and
        keys of a document. Rows that are not packed become documents of equal length."""
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        if (own := self.documents) is not None and (keys := self.documents_k) is not None:
            longest = max(own.lengths), max(keys.lengths)
            return q, k, v, own.boundaries, keys.boundaries, *longest
        B, T, S = *self.q.shape[:2], self.k.shape[1]
        rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
        return q, k, v, rows * T, rows * S, T, S


# Output (B, T, H, D), contiguous, and B * T * H logarithms of the softmax's sums, in an order that
# the backend alone knows: a backward pass finds the weights by them. None where none may follow.
Result = tuple[Tensor, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention. ``refuse`` says in words why it cannot serve a request here, None
    if it can; ``forward`` gives the `Result`, and ``backward`` the gradients of queries, keys and
    values from the request, the gradient of its output, and what `forward` returned. Without one,
    torch's autograd goes through `forward`, and a compiled block is split around it."""

    name: str
    refuse: Callable[[Request], str | None]
    forward: Callable[[Request], Result]
    backward: Callable[[Request, Tensor, Tensor, Tensor], Gradients] | None = None


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
    """A module of an optional ``package`` from an ``extra``, or a string that says why there is
    none. It must have the ``function``: packages may share their first name."""
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
