"""Learning-rate schedules: a multiplier of the peak rate for each optimizer step, from 0 on."""

import math
from dataclasses import dataclass
from typing import Literal

from ropepp.errors import InputError, at_least


@dataclass(frozen=True)
class Schedule:
    """Constant after a linear warm-up; sub-classes say what follows the warm-up.

    Args:
        warmup_steps: Steps over which the rate rises linearly from 0.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        at_least(0, warmup_steps=self.warmup_steps)

    def check(self, total_steps: int) -> None:
        """Raises `InputError` if the schedule does not fit into ``total_steps``."""
        if self.warmup_steps > total_steps:
            raise InputError(
                f"warmup_steps is {self.warmup_steps}, more than the run's {total_steps} steps "
                "(trainer.max_steps)"
            )

    def multiplier(self, step: int, total_steps: int) -> float:
        """The rate at ``step`` as a share of the peak."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.after_warmup(step, total_steps)

    def after_warmup(self, step: int, total_steps: int) -> float:
        """The same for steps from ``warmup_steps`` on."""
        return 1.0


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then constant (the paper's pre-training)."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm-up, then a half cosine to ``final`` of the peak (the paper's long-context stage)."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, final=self.final)

    def after_warmup(self, step: int, total_steps: int) -> float:
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final + (1 - self.final) * half_cosine(progress)


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay to 0 over the last ``decay_steps`` (arXiv 2404.06395).

    Args:
        decay_steps: Steps at the end over which it falls to 0.
        shape: Shape of the fall.
    """

    decay_steps: int = 0
    shape: Literal["cosine", "linear"] = "cosine"

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        if not 0 <= self.decay_steps <= total_steps - self.warmup_steps:
            raise InputError(
                f"decay_steps is {self.decay_steps}; after {self.warmup_steps} steps of warm-up "
                f"0 to {total_steps - self.warmup_steps} are left"
            )

    def after_warmup(self, step: int, total_steps: int) -> float:
        start = total_steps - self.decay_steps
        if step < start:
            return 1.0
        progress = (step - start) / max(1, self.decay_steps)
        return half_cosine(progress) if self.shape == "cosine" else max(0.0, 1.0 - progress)


def half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1 and beyond."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
