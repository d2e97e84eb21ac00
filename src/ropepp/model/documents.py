"""Where documents begin and end in packed rows, known to the host and to the device."""

import itertools
import sys
from collections.abc import Callable
from typing import Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.errors import InputError

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A function's last few results, by the identity of tensors: all layers ask with the same."""

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


def _lengths(host: Tensor) -> tuple[int, ...]:
    bounds = host.tolist()
    sizes = tuple(b - a for a, b in itertools.pairwise(bounds))
    if not sizes or bounds[0] != 0 or min(sizes) < 0:
        raise InputError(
            f"boundaries of documents are {bounds[:8]}{'...' if len(bounds) > 8 else ''}; "
            "they must begin at 0 and never fall"
        )
    return sizes


class Documents:
    """Documents that lie one after another in the flattened tokens of rows. Kernels on a GPU read
    the ``boundaries`` there, (documents + 1,) from 0 to B * T, and the host needs them to choose a
    grid: it keeps its own, so that nobody waits for the device."""

    def __init__(self, host: Tensor, boundaries: Tensor | None = None) -> None:
        self.host = host.to(torch.int32)
        self.boundaries = self.host if boundaries is None else boundaries.to(torch.int32)

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Documents":
        """From boundaries on any device, once for all layers; on a GPU this waits for it."""
        return _FOUND.get((cu_seqlens,), lambda: Documents(cu_seqlens.cpu(), cu_seqlens))

    @classmethod
    def from_ids(cls, document_ids_BT: Tensor) -> Self | None:
        """The documents of each row, padding (-1) too; None if one is split. Waits for a GPU."""
        starts = _starts(document_ids_BT)
        if starts.sum() != _starts(document_ids_BT.sort(dim=1).values).sum():
            return None
        starts = starts.flatten().nonzero().flatten()
        boundaries = torch.cat((starts, starts.new_tensor([document_ids_BT.numel()])))
        return cls(boundaries.cpu(), boundaries)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, found once; an `InputError` if boundaries fall, or skip 0."""
        return _LENGTHS.get((self.host,), lambda: _lengths(self.host))

    def check(self, B: int, T: int) -> None:
        """Refuses what are not documents of B rows of T tokens: none may cross a row's end."""
        ends = set(itertools.accumulate(self.lengths))
        if max(ends) != B * T or not ends.issuperset(range(T, B * T, T)):
            raise InputError(
                f"document_ids have boundaries {self.host.tolist()[:8]}..., which are not those of "
                f"{B} rows of {T} tokens"
            )

    def for_any_number(self) -> Self:
        """Itself, of which no number of documents is to be compiled in."""
        if dynamo := sys.modules.get("torch._dynamo"):  # which takes a second to import
            for bounds in (self.host, self.boundaries):
                dynamo.mark_dynamic(bounds, 0)
        return self

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """With boundaries on another device; those of the host stay."""
        return type(self)(self.host, self.host.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """In memory from which a GPU copies while the host goes on."""
        return type(self)(self.host.pin_memory())


_FOUND: Recent[Documents] = Recent()


def _starts(ids_BT: Tensor) -> Tensor:
    return F.pad(ids_BT.diff(dim=1) != 0, (1, 0), value=True)
