"""One progress bar over the optimizer steps of a run, and one for each validation."""

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from ropepp.train.callbacks.metrics import Metrics


class StepProgress(ProgressBar):
    """Shows steps done of ``trainer.max_steps``, the remaining time, and the latest loss and
    speed."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics
        self.label = ""
        self._enabled = True
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = self._open(int(trainer.max_steps), "step", self.label or "fit")
        self._bar.update(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        shown = {
            name: f"{self.metrics.latest[key]:{form}}"
            for name, key, form in (
                ("loss", "train/loss", ".3f"),
                ("val", "validation/loss", ".3f"),
                ("tok/s", "utilisation/tokens_per_second", ",.0f"),
            )
            if key in self.metrics.latest
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("_bar")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close("_evaluation")
        self._close("_bar")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_val_batches
        total = sum(batches) if isinstance(batches, list) else batches
        self._evaluation = self._open(int(total), "batch", "validate", leave=False)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.update()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("_evaluation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_test_batches
        total = sum(batches) if isinstance(batches, list) else batches
        self._evaluation = self._open(int(total), "batch", "test", leave=False)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("_evaluation")

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            tqdm.write(" ".join(str(arg) for arg in args))

    def _open(self, total: int, unit: str, label: str, leave: bool = True) -> tqdm:
        return tqdm(
            total=total,
            unit=unit,
            desc=label,
            leave=leave,
            dynamic_ncols=True,
            disable=not self._enabled,
            smoothing=0.1,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,
        )

    def _close(self, name: str) -> None:
        bar = getattr(self, name)
        if bar is not None:
            bar.close()
            setattr(self, name, None)
