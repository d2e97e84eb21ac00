"""What a backend is asked for."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

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
        key = tuple(_identity(x) if isinstance(x, Tensor) else x for x in arguments)
        if key not in self._entries:
            # With the arguments: a tensor that is gone would leave its identity to another.
            self._entries[key] = (arguments, make())
            if len(self._entries) > self.size:
                del self._entries[next(iter(self._entries))]
        return self._entries[key][1]


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is changed in place; torch does not count for inference tensors."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


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
