"""Being asked to end: SIGTERM, and SIGUSR1 as SLURM sends it before the time is up."""

import signal
import threading
from types import FrameType

import lightning.pytorch as pl
import torch

ASKED_BY = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes a signal instead of obeying at once; processes agree on it once a step.

    Lightning's own handler exchanges messages inside the handler, which deadlocks processes that
    are at different places; it puts the handlers from before back when a run is over.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Replaces the handlers; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in ASKED_BY:
                signal.signal(number, self._note)

    def agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any process has received one; to be called by all of them."""
        own = float(self.received is not None)
        if trainer.world_size == 1:
            return bool(own)
        flag = torch.tensor(own, device=trainer.strategy.root_device)
        total = trainer.strategy.reduce(flag, reduce_op="sum")
        return bool(float(total))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
