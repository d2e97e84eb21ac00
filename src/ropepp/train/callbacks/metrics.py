"""Logs what a run does, once an optimizer step at most and without waiting for the GPU in
between."""

import statistics
import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.flops import training_flops
from ropepp.train.logger import RunLogger
from ropepp.train.module import LanguageModel


class Metrics(pl.Callback):
    """Logs loss, gradient norm, learning rate, tokens and speed every n-th optimizer step, and each
    validation.

    The speed includes waiting for data and writing checkpoints, and leaves validation out.

    Args:
        every_n_steps: Optimizer steps between log entries.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise InputError(f"metrics.every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.tokens = 0
        self.latest: dict[str, float] = {}
        self._rates: list[float] = []
        self._loss_sum: Tensor | float = 0.0
        self._validation_start = 0.0
        self._reset_window()

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged windows without the first, which holds compilation."""
        rates = self._rates[1:] or self._rates
        return statistics.median(rates) if rates else None

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.cut(trainer.global_step)
        self._loss_sum = 0.0
        self._reset_window()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._loss_sum = self._loss_sum + outputs["loss_sum"]
        tokens = batch["input_ids"].numel() * trainer.world_size
        self.tokens += tokens
        self._window_tokens += tokens
        self._window_pairs += _attended_pairs(batch) * trainer.world_size
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module, batch)
            self._reset_window()
        self._loss_sum = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        values = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("validation")
        }
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._window_start += time.perf_counter() - self._validation_start

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        assert isinstance(pl_module, LanguageModel)
        assert pl_module.grad_norm is not None
        loss = self._loss_sum
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="sum")
        values = {
            "train/loss": float(loss) / max(1, batch["num_targets"]),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/learning_rate": pl_module.learning_rate,
            "train/tokens": float(self.tokens),
        }
        seconds = time.perf_counter() - self._window_start
        rate = self._window_tokens / seconds
        self._rates.append(rate)
        flops = training_flops(pl_module.network, self._window_tokens, int(self._window_pairs))
        values["utilisation/tokens_per_second"] = rate
        values["utilisation/model_tflops_per_second"] = flops / seconds / 1e12
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _reset_window(self) -> None:
        self._window_start = time.perf_counter()
        self._window_tokens = 0
        self._window_pairs: Tensor | int = 0


def _attended_pairs(batch: Any) -> Tensor | int:
    """Visible (query, key) pairs of a batch: positions restart at each document that is hidden from
    others."""
    positions = batch.get("positions")
    if positions is None:
        B, T = batch["input_ids"].shape
        return B * T * (T + 1) // 2
    return (positions + 1).sum()
