"""One progress bar over the optimizer steps of a run, and one for each evaluation."""

import sys
from functools import partialmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ropepp.train.callbacks.metrics import Metrics

SHOWN = {  # in the log, and how
    "loss": ("train/loss", ".3f"),
    "val": ("validation/loss", ".3f"),
    "tok/s": ("utilisation/tokens_per_second", ",.0f"),
}


class StepProgress(TQDMProgressBar):
    """Shows steps done, the remaining time, and the latest loss and speed, on standard error."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        super().__init__()
        self.watched = sys.stderr.isatty()
        self.metrics = metrics
        self.label = label
        self._bars: list[Tqdm] = []

    def init_train_tqdm(self) -> Tqdm:
        total, done = int(self.trainer.max_steps), self.trainer.global_step
        return self._bar(self.label, leave=True, unit="step", total=total, initial=done)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Nothing: the bar is that of all epochs."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self.train_progress_bar
        if trainer.global_step > bar.n:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for bar in self._bars:
            bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        latest = self.metrics.latest
        return {
            name: f"{latest[key]:{form}}" for name, (key, form) in SHOWN.items() if key in latest
        }

    def _bar(self, label: str, leave: bool = False, unit: str = "batch", **options: Any) -> Tqdm:
        bar = Tqdm(
            desc=label,
            unit=unit,
            leave=leave,
            # In a file there is a line now and then of the run's own bar.
            disable=self.is_disabled or not (self.watched or leave),
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.1 if self.watched else 30.0,
            **options,
        )
        self._bars.append(bar)
        return bar

    init_validation_tqdm = partialmethod(_bar, "validate")
    init_test_tqdm = partialmethod(_bar, "test")
    init_predict_tqdm = partialmethod(_bar, "predict")
