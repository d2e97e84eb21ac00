"""Checkpoints that are complete or absent, at intervals, at the end, and when a run must stop."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from ropepp.errors import InputError, Preempted, Stopped, at_least
from ropepp.files import disk_errors, remove, sync_folder
from ropepp.model.plain import understanding
from ropepp.runs.checkpoints import list_checkpoints
from ropepp.runs.process import StopRequest
from ropepp.train.callbacks.step import StepCallback
from ropepp.train.checkpoint_files import CheckpointFiles
from ropepp.train.guard import StepGuard
from ropepp.train.logger import RunLogger
from ropepp.train.strategy import FSDP2Strategy

ROWS = "rows_per_batch"
ANSWER = b"\nending after this step, with a checkpoint (Ctrl-\\ ends at once)\n"
_LEFT = re.compile(r"step-\d+\.tmp|\.step-.*\.partial-.*")  # what a kill leaves of a save


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves ``step-N.ckpt`` after every n-th optimizer step and at the end; keeps the newest.

    A checkpoint gets its name when it is complete, so that a kill leaves no torn one. Where a
    validation follows a step, it is saved after the validation, which then is not repeated.

    A run that is asked to end (SIGTERM, Ctrl-C, SIGHUP of a closed terminal, SLURM's SIGUSR1), or
    skipped too many steps, saves after this step (several processes: the next), raises `Stopped`.

    Args:
        every_n_steps: Optimizer steps between checkpoints; 0 saves at the end alone.
        keep: How many of the newest to keep; 0 keeps all.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        super().__init__()
        at_least(0, "checkpoint.", every_n_steps=every_n_steps, keep=keep)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.directory: Path | None = None  # set by whoever knows the run directory
        self._request = StopRequest(ANSWER)
        self._stop: Stopped | None = None
        self._unfinished: Path | None = None  # written in the background, not yet renamed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._asked = Question()
        self._saved_step = trainer.global_step  # nothing is due right after a resume
        self.on_validation_start(trainer, pl_module)
        self._request.__enter__()  # where it fails, `own_process` ends it

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        pending = getattr(trainer.strategy, "pending_save", None)
        if pending is not None and pending.done():
            self._finish(trainer)
        if self._asked.by_any(self._request.made, trainer):
            self._stop = Preempted(
                f"stopped at step {trainer.global_step} on request; the same command with "
                "--resume auto goes on"
            )
        guard: StepGuard | None = getattr(pl_module, "guard", None)
        self._stop = self._stop or (guard.verdict if guard else None)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
            trainer.strategy.checkpoint_io.restoring = None

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._finish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._request.__exit__()  # all is saved

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[ROWS] = trainer.datamodule.rows_per_batch  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts batches in this run's unit: another number of processes has others a step."""
        if trainer.state.fn != "fit" or ROWS not in checkpoint:
            return
        here = trainer.datamodule.rows_per_batch  # type: ignore[attr-defined]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        rows, steps = progress["total"]["ready"] * checkpoint[ROWS], checkpoint["global_step"]
        size = trainer.datamodule.global_batch_size  # type: ignore[attr-defined]
        if rows != steps * size:  # a step would begin amid another, and have a part of its rows
            raise InputError(
                f"data.global_batch_size is {size}, the checkpoint's was {rows / max(1, steps):g}: "
                "go on with that, or begin with its weights alone by --init_from"
            )
        for counts in (progress["total"], progress["current"]):
            # The batch after which it was saved was not yet counted as completed.
            begun = counts["ready"]
            for key, value in counts.items():
                counts[key] = begun * checkpoint[ROWS] // here - (begun - value)

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._stop or (self.every_n_steps > 0 and step % self.every_n_steps == 0):
            self._save(trainer)
        if self._stop:
            self._finish(trainer)
            raise self._stop

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step or self.directory is None:
            return
        self._finish(trainer)
        self._saved_step = trainer.global_step
        path = self.directory / f"step-{trainer.global_step:07d}.ckpt"
        trainer.save_checkpoint(path.with_suffix(".tmp"), weights_only=False)
        self._unfinished = path
        if getattr(trainer.strategy, "pending_save", None) is None:
            self._finish(trainer)
            trainer.strategy.barrier("checkpoint renamed")

    def _finish(self, trainer: Trainer) -> None:
        """Waits for what is being written, if anything is, and gives it its name."""
        path, self._unfinished = self._unfinished, None
        if path is None:
            return
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.wait_for_save()
        if not trainer.is_global_zero:
            return
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.sync()  # what a run that goes on from here needs
        with disk_errors(path):
            remove(path)  # a damaged one, or one of another way to get here
            os.replace(path.with_suffix(".tmp"), path)
            sync_folder(path.parent)
        # Later ones, which a run that went back has left behind, do not count.
        so_far = [old for old in list_checkpoints(path.parent) if old.name <= path.name]
        left = [one for one in path.parent.iterdir() if _LEFT.fullmatch(one.name)]
        for old in [*left, *(so_far[: -self.keep] if self.keep else [])]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Says which checkpoint it was whose content cannot be put in place."""
        path = getattr(trainer.strategy.checkpoint_io, "restoring", None)
        if path is not None and not isinstance(exception, InputError | OSError):
            with understanding(path):
                raise exception


class Question:
    """What processes ask each other once a step; several know a step later: no GPU runs dry."""

    def __init__(self) -> None:
        self._answer: Tensor | None = None
        self._there: torch.cuda.Event | None = None

    def by_any(self, own: bool, trainer: Trainer) -> bool:
        """Whether any process said yes when this was asked last; of one process, what it says."""
        if trainer.world_size == 1:
            return own
        if self._there is not None:
            self._there.synchronize()
        before = self._answer is not None and bool(self._answer)
        answer = torch.full((), float(own), device=trainer.strategy.root_device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        # Into pinned memory, behind everything that the GPU has to do before.
        self._answer = answer.to("cpu", non_blocking=True)
        if answer.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()
        return before
