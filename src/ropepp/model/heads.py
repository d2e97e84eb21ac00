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
