"""A trace of a few optimizer steps: where the time goes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from ropepp.errors import InputError


class StepProfile(pl.Callback):
    """Writes ``profile/rank-N.json``, to be opened in Perfetto or chrome://tracing.

    Args:
        steps: Optimizer steps to record; 0 records nothing.
        first_step: Optimizer step at which recording begins, counted from the run's start or
            resume; the first ones compile and warm up.
    """

    def __init__(self, steps: int = 0, first_step: int = 10) -> None:
        for name, value in (("steps", steps), ("first_step", first_step)):
            if value < 0:
                raise InputError(f"profile.{name} is {value}; it must be at least 0")
        self.steps = steps
        self.first_step = first_step
        self.directory: Path | None = None  # set by whoever knows the run directory
        self._begin = -1
        self._profile: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = trainer.global_step + self.first_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.steps and trainer.global_step == self._begin and self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._profile is not None and trainer.global_step >= self._begin + self.steps:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._profile is not None:  # the run is shorter
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        assert self._profile is not None
        assert self.directory is not None
        self._profile.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"rank-{trainer.global_rank}.json"
        temporary = path.with_suffix(".tmp")
        self._profile.export_chrome_trace(str(temporary))
        temporary.rename(path)
        self._profile = None
        self._begin = -1
