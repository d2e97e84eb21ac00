"""Scalars of a run, once in TensorBoard and once as lines of JSON."""

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from ropepp.files import write_text


class RunLogger(TensorBoardLogger):
    """Writes every scalar to the TensorBoard events and to ``metrics.jsonl`` of a run directory.

    A step is the number of completed optimizer steps. A resumed run calls `cut` first, so that each
    step stands once in both.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory.parent, name="", version=directory.name)
        self.metrics_file = directory / "metrics.jsonl"

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run's ``config.yaml`` is complete."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drops what was logged after ``step``, from where a run starts or resumes."""
        if not self.metrics_file.exists():
            return
        # As for SummaryWriter's purge_step, which had to be known before Lightning opens it.
        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(start)
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
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in metrics.items()
            if key != "epoch"
        }
        if values:
            super().log_metrics(values, step)
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    @rank_zero_only
    def sync(self) -> None:
        """Returns when the disk has all lines so far."""
        self.save()
        if self.metrics_file.exists():
            with self.metrics_file.open("a") as file:
                os.fsync(file.fileno())

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
        """Without Lightning's ``hparams.yaml``."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success":
            self.save()  # and stays open: losses by position come after the fit
        else:
            super().finalize(status)
