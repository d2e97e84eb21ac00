"""Logs what a run does, once an optimizer step at most; in between it does not wait for a GPU."""

import statistics
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ropepp.data.loading.datamodule import data_rank_and_size
from ropepp.data.loading.loader import TrainLoader
from ropepp.errors import InputError, at_least
from ropepp.model.flops import training_flops
from ropepp.runs.machine import peak_flops, peak_memory_bytes
from ropepp.train.callbacks.step import StepCallback
from ropepp.train.logger import RunLogger


class Metrics(StepCallback):
    """Logs loss, gradient norm, learning rate, tokens and utilisation; and each validation.

    The speed includes waiting for data and writing checkpoints, and leaves validation out. FLOPs
    are the model's, of the tokens and visible pairs that were read; recomputation does not count.

    Args:
        every_n_steps: Optimizer steps between log entries.
        peak_tflops: What a device can do, for the MFU; its data sheet's dense bfloat16 if known.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        at_least(1, "metrics.", every_n_steps=every_n_steps)
        if peak_tflops is not None and peak_tflops <= 0:
            raise InputError(f"metrics.peak_tflops is {peak_tflops}; it must be greater than 0")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self.tokens = 0
        self.latest: dict[str, float] = {}
        self._rates: list[float] = []
        self._waited = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged windows without the first, which holds compilation."""
        rates = self._rates[1:] or self._rates
        return statistics.median(rates) if rates else None

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "train_loss": self.latest.get("train/loss")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]
        if (loss := state_dict.get("train_loss")) is not None:  # for a run with no step left
            self.latest["train/loss"] = loss

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.cut(trainer.global_step)
        self._loss_sum: Tensor | float = 0.0
        self._reset_window()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss_sum = self._loss_sum + outputs["loss_sum"]
        positions, (B, T) = batch.get("positions"), batch["input_ids"].shape
        tokens = B * T * data_rank_and_size(trainer)[1]
        self.tokens += tokens
        self._window_tokens += tokens
        # A query sees as many keys as its position says: that restarts at each hidden document.
        pairs = B * T * (T + 1) // 2 if positions is None else (positions + 1).sum()
        self._window_pairs += pairs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, pl_module, batch)
            self._reset_window()
        self._loss_sum = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        seconds = time.perf_counter() - self._validation_start
        found = trainer.callback_metrics.items()
        values = {key: float(value) for key, value in found if key.startswith("validation")}
        values["utilisation/validation_seconds"] = seconds
        self._write(trainer, values)
        self.leave_out(seconds)

    def leave_out(self, seconds: float) -> None:
        """Keeps time that went into something else than training out of the next speed."""
        self._window_start += seconds

    def _log(self, trainer: Trainer, pl_module: Any, batch: Any) -> None:
        seconds = time.perf_counter() - self._window_start
        gathered = self._gather(trainer)
        loss_sum, pairs, waited, _ = gathered.sum(dim=0).tolist()
        values = {
            "train/loss": loss_sum / max(1, batch["num_targets"]),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/learning_rate": pl_module.learning_rate,
            "train/tokens": float(self.tokens),
        }
        if pl_module.guard is not None:
            values["train/skipped_steps"] = float(pl_module.guard.skipped)
        world = trainer.world_size
        rate = self._window_tokens / seconds
        self._rates.append(rate)
        # Processes that share rows have each counted the pairs of all of them.
        all_pairs = int(pairs) * data_rank_and_size(trainer)[1] // world
        flops = training_flops(pl_module.network, self._window_tokens, all_pairs) / seconds
        values |= {
            "utilisation/tokens_per_second": rate,
            "utilisation/tokens_per_second_per_device": rate / world,
            "utilisation/model_tflops_per_second": flops / 1e12,
            "utilisation/data_wait_share": waited / world / seconds,
            "utilisation/peak_memory_gb": float(gathered[:, 3].max()) / 1e9,
        }
        device = trainer.strategy.root_device
        peak = self.peak_tflops * 1e12 if self.peak_tflops else peak_flops(device)
        if peak is not None:
            values["utilisation/mfu"] = flops / (peak * world)
        self._write(trainer, values)

    def _gather(self, trainer: Trainer) -> Tensor:
        """Of each process (processes, 4) float64 on the host: loss, visible pairs and seconds spent
        waiting for data since the last entry, and its peak memory in bytes."""
        loader, device = trainer.train_dataloader, trainer.strategy.root_device
        total = loader.seconds_waited if isinstance(loader, TrainLoader) else 0.0
        waited, self._waited = total - self._waited, total
        values = [float(self._loss_sum), float(self._window_pairs), waited]
        own = torch.tensor([*values, peak_memory_bytes(device)], dtype=torch.float64)
        if trainer.world_size == 1:
            return own[None]
        return trainer.strategy.all_gather(own.to(device)).cpu()

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.latest.update(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _reset_window(self) -> None:
        self._window_start = time.perf_counter()
        self._window_tokens = 0
        self._window_pairs: Tensor | int = 0
