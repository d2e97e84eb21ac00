"""Which projection, phase and kv head each attention head uses: the table behind every variant.

A rotary head is a *phase*: it scores with its projected query turned by that phase before the
rotation (RoPE++, arXiv 2512.07525). RoPE is phase 0; the imaginary head is phase -90 degrees of the
same query.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ropepp.errors import InputError

MOST_HEADS = 2**12  # of a layer


class Head(NamedTuple):
    """One attention head: its query projection, its phase in degrees and the kv head it reads."""

    projection: int
    phase: float
    kv_head: int


@dataclass(frozen=True)
class HeadLayout:
    """The attention heads of a layer, in the order in which the kernel sees them. An `InputError`
    if a projection or kv head is skipped, or the kv heads do not serve equally many heads in order:
    a grouped-query kernel assigns head h to kv head ``h // G`` and would mix them silently."""

    heads: tuple[Head, ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise InputError("a head layout needs at least one head")
        projections = {head.projection for head in self.heads}
        if projections != set(range(len(projections))):
            raise InputError(
                f"query projections must be numbered 0, 1, 2, ...: found {sorted(projections)}"
            )
        for head in self.heads:
            if not math.isfinite(head.phase):
                raise InputError(
                    f"the phase of projection {head.projection} is {head.phase} degrees"
                )
        served = [head.kv_head for head in self.heads]
        per_kv_head = [served.count(k) for k in range(max(served) + 1)]
        if len(set(per_kv_head)) > 1:
            raise InputError(
                f"kv heads serve {per_kv_head} attention heads: each must serve the same number"
            )
        if served != sorted(served):
            raise InputError(f"heads must be in the order of their kv heads: found {served}")

    @classmethod
    def from_phases(cls, phases: Sequence[Sequence[float]], num_kv_heads: int) -> Self:
        """One entry a projection: its phases in degrees, of heads side by side. Projections are
        split evenly over the kv heads; an `InputError` if that is impossible."""
        if num_kv_heads < 1 or len(phases) % num_kv_heads:
            raise InputError(
                f"{len(phases)} query projections do not divide over {num_kv_heads} kv heads"
            )
        if sum(map(len, phases)) > MOST_HEADS:
            raise InputError(f"a layer would have more than {MOST_HEADS:,} attention heads")
        per_kv_head = len(phases) // num_kv_heads
        return cls(
            tuple(
                Head(projection, float(phase), projection // per_kv_head)
                for projection, own in enumerate(phases)
                for phase in own
            )
        )

    @property
    def num_heads(self) -> int:
        """Attention heads (H): the output projection reads ``H * D`` values."""
        return len(self.heads)

    def places_of(self, other: "HeadLayout") -> list[int]:
        """Which head here is each of another layout's: of the same projection, phase and kv head.
        An `InputError` if one is not here, or here are more projections or kv heads."""
        free = [(head.projection, head.phase % 360, head.kv_head) for head in self.heads]
        places: list[int] = []
        for head in other.heads:
            key = (head.projection, head.phase % 360, head.kv_head)
            if key not in free:
                raise InputError(
                    f"of {other.num_heads} attention heads not all are among the new "
                    f"{self.num_heads}, so what they add would be lost: the first has projection "
                    f"{head.projection}, phase {head.phase:g} degrees, kv head {head.kv_head}"
                )
            places.append(free.index(key))
            free[places[-1]] = (-1, 0.0, -1)
        counts = [(x.num_projections, x.num_kv_heads) for x in (other, self)]
        if counts[0] != counts[1]:
            raise InputError(
                f"there are {counts[0][0]} query projections and {counts[0][1]} kv heads, and "
                f"{counts[1][0]} and {counts[1][1]} are needed: only heads can be added"
            )
        return places

    @cached_property
    def num_projections(self) -> int:
        """Query projections (P)."""
        return max(head.projection for head in self.heads) + 1

    @cached_property
    def num_kv_heads(self) -> int:
        """Key/value heads (K), the ones that a cache holds."""
        return self.heads[-1].kv_head + 1

    @cached_property
    def period(self) -> tuple[Head, ...]:
        """The shortest run of heads whose repetition, with projections shifted along, is the
        layout. EC and EH have (0, 0), (0, -90): one concatenation serves all projections."""
        H, P = self.num_heads, self.num_projections
        for size in range(1, H + 1):
            if H % size or P * size % H:
                continue
            step = P * size // H
            run = self.heads[:size]
            if {head.projection for head in run} == set(range(step)) and all(
                head.projection == run[i % size].projection + step * (i // size)
                and head.phase == run[i % size].phase
                for i, head in enumerate(self.heads)
            ):
                return run
        raise AssertionError("the whole layout is a period of itself")


def turn(a: Tensor, b: Tensor, phase: float) -> tuple[Tensor, Tensor]:
    """Turns the vector of halves [a, b] by ``phase`` degrees; multiples of 90 are copies, exact.

    Phase p is ``cos(p) [a, b] + sin(p) [-b, a]``, so -90 degrees is [b, -a] (the imaginary head).
    """
    match phase % 360:
        case 0:
            return a, b
        case 90:
            return -b, a
        case 180:
            return -a, -b
        case 270:
            return b, -a
    cos, sin = math.cos(math.radians(phase)), math.sin(math.radians(phase))
    return cos * a - sin * b, cos * b + sin * a


def turned(weight: Tensor, layout: HeadLayout) -> Tensor:
    """A query matrix (H D, M), float64, in which every head has rows of its own, from one of
    projections (P D, M).

    A turn of a query commutes with its rotation, so a head with phase p is one with phase 0 whose
    rows of halves [a, b] are ``cos(p) [a, b] + sin(p) [-b, a]`` (see `turn`).
    """
    a, b = weight.double().unflatten(0, (layout.num_projections, 2, -1)).unbind(1)
    return torch.cat([x for p, phase, _ in layout.heads for x in turn(a[p], b[p], phase)])


def turned_back(weight: Tensor, layout: HeadLayout) -> Tensor | None:
    """What `turned` has made ``weight`` of; None if its heads are no turned copies."""
    a, b = weight.double().unflatten(0, (layout.num_heads, 2, -1)).unbind(1)
    # Of each projection a head that is an exact copy, if there is one.
    order = sorted(range(layout.num_heads), key=lambda i: layout.heads[i].phase % 90 == 0)
    of = {layout.heads[i].projection: i for i in order}
    chosen = [of[p] for p in range(layout.num_projections)]
    found = torch.cat([x for i in chosen for x in turn(a[i], b[i], -layout.heads[i].phase)])
    exact = all(head.phase % 90 == 0 for head in layout.heads)
    bound = 0.0 if exact else 2 * torch.finfo(weight.dtype).eps * weight.abs().max().item()
    return found if torch.allclose(turned(found, layout), weight.double(), 0.0, bound) else None
