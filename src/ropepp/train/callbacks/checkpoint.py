"""Checkpoints that are complete or absent."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from ropepp.errors import InputError

_NAME = re.compile(r"step-(\d+)\.ckpt")


class StepCheckpoint(Checkpoint):
    """Saves ``step-N.ckpt`` after every n-th optimizer step and at the end, and keeps the newest
    ones.

    A checkpoint is written under a temporary name and renamed when complete, so that a kill leaves
    no torn one under a final name. Where a validation follows a step, it is saved after the
    validation, which then is not repeated.

    Args:
        every_n_steps: Optimizer steps between checkpoints; 0 saves at the end alone.
        keep: How many of the newest to keep; 0 keeps all.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 0:
                raise InputError(f"checkpoint.{name} is {value}; it must be at least 0")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.directory: Path | None = None  # set by whoever knows the run directory
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step  # nothing is due right after a resume

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if self._due(trainer) and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._due(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        return self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._saved_step or self.directory is None:
            return
        self._saved_step = trainer.global_step
        path = self.directory / f"step-{trainer.global_step:07d}.ckpt"
        temporary = path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            os.replace(temporary, path)
            for old in self._surplus():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        trainer.strategy.barrier("checkpoint renamed")

    def _surplus(self) -> list[Path]:
        assert self.directory is not None
        return list_checkpoints(self.directory)[: -self.keep] if self.keep else []


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in directory.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
