"""Keeps a bad step from spoiling the weights."""

import math
import statistics
from collections import deque
from typing import Any

from lightning.pytorch import Callback, Trainer

from ropepp.errors import Diverged, InputError, at_least

HISTORY = 100


class StepGuard(Callback):
    """Skips optimizer steps whose gradient is not finite or far too large, and counts them.

    A skipped step leaves weights and optimizer state as they were; data and schedule move on. The
    gradient's norm is that over all processes, so all of them decide alike.

    Args:
        spike_factor: Also skip where the norm before clipping is more than this many times the
            median of the last 100 accepted ones; off unless given.
        stop_after: Skipped steps in a row after which the run saves and ends with an error.
    """

    def __init__(self, spike_factor: float | None = None, stop_after: int = 20) -> None:
        if spike_factor is not None and spike_factor <= 1:
            raise InputError(f"guard.spike_factor is {spike_factor}; it must be greater than 1")
        at_least(1, "guard.", stop_after=stop_after)
        self.spike_factor = spike_factor
        self.stop_after = stop_after
        self.skipped = 0
        self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=HISTORY)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.guard = self

    def accepts(self, norm: float) -> bool:
        """Whether to make a step whose gradient has this norm."""
        limit = math.inf
        # The norms of a run's first steps say little about later ones.
        if self.spike_factor is not None and len(self._norms) >= HISTORY // 5:
            limit = self.spike_factor * statistics.median(self._norms)
        if math.isfinite(norm) and norm <= limit:
            self._norms.append(norm)
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    @property
    def verdict(self) -> Diverged | None:
        """Why the run must end, if it must."""
        if self.in_a_row < self.stop_after:
            return None
        return Diverged(
            f"{self.in_a_row} steps in a row had a gradient that is not finite or a spike and were "
            "skipped; lower the learning rate or look at the data"
        )

    def state_dict(self) -> dict[str, Any]:
        # Not `in_a_row`: whoever goes on after a stop has changed something.
        return {"skipped": self.skipped, "norms": list(self._norms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self._norms = deque(state_dict["norms"], maxlen=HISTORY)
