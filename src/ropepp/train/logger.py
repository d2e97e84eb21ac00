"""Scalars of a run, once in TensorBoard and once as lines of JSON."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter

from ropepp.files import write_text


class RunLogger(Logger):
    """Writes every scalar to the TensorBoard events and to ``metrics.jsonl`` of a run directory.

    A step is the number of completed optimizer steps. A resumed run calls `cut` first, so that each
    step stands once in both.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    @property
    def name(self) -> str:
        return self.directory.parent.name

    @property
    def version(self) -> str:
        return self.directory.name

    @property
    def save_dir(self) -> str:
        return str(self.directory)

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The TensorBoard writer, opened at its first use."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.directory), purge_step=self._purge_step)
        return self._writer

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run's ``config.yaml`` is complete."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drops what was logged after ``step``, from where a run starts or resumes."""
        if step == 0 and not self.metrics_file.exists():
            return
        if self._writer is not None:  # Lightning opens it before the step is known
            self._writer.close()
            self._writer = None
        self._purge_step = step + 1
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                keep = json.loads(line)["step"] <= step
            except ValueError:  # a kill can tear the last line
                keep = False
            if keep:
                kept.append(line + "\n")
        write_text(self.metrics_file, "".join(kept))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in metrics.items()
            if key != "epoch"
        }
        if not values:
            return
        for key, value in values.items():
            self.experiment.add_scalar(key, value, step)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    @rank_zero_only
    def log_by_position(self, losses: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Loss by position of each evaluation set, to TensorBoard alone: its step is the
        position."""
        for name, by_position in losses.items():
            for position, loss in zip(by_position["position"], by_position["loss"], strict=True):
                self.experiment.add_scalar(
                    f"loss_by_position/validation{name}", loss, round(position)
                )
        self.save()

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
