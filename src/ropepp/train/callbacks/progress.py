"""One progress bar over the optimizer steps of a run, and on a terminal one for each validation."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from tqdm import tqdm

from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.callbacks.step import StepCallback

SHOWN = {  # in the log, and how
    "loss": ("train/loss", ".3f"),
    "val": ("validation/loss", ".3f"),
    "tok/s": ("utilisation/tokens_per_second", ",.0f"),
}


class StepProgress(StepCallback):
    """Shows steps done, the remaining time, and the latest loss and speed, on standard error."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        self.metrics = metrics
        self.label = label

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.bar = tqdm(
            desc=self.label,
            unit="step",
            total=trainer.max_steps,
            initial=trainer.global_step,
            disable=not trainer.is_global_zero,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # in a file a line now and then
        )

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        now = self.metrics.latest
        shown = {name: f"{now[key]:{form}}" for name, (key, form) in SHOWN.items() if key in now}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = trainer.is_global_zero and sys.stderr.isatty()
        total = sum(trainer.num_val_batches)
        self.validation = tqdm(
            desc="validate", total=total, leave=False, disable=not shown, dynamic_ncols=True
        )

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for bar in (getattr(self, name, None) for name in ("validation", "bar")):
            if bar is not None:
                bar.close()
