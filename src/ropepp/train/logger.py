"""Scalars of a run, once in TensorBoard and once as lines of JSON."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from ropepp.files import disk_errors, write_text
from ropepp.runs.events import EVENTS, write_events
from ropepp.runs.records import METRICS, entry

POSITIONS = ".position"  # behind the name of an event file: one whose steps are positions


class RunLogger(TensorBoardLogger):
    """Writes every scalar to TensorBoard events and to ``metrics.jsonl``. A step is the number of
    completed optimizer steps, and stands once in both: a run calls `cut` first."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory.parent, name="", version=directory.name)
        self.directory = directory
        self.metrics_file = directory / METRICS

    @property
    def log_dir(self) -> str:
        """The run's folder as it is; Lightning would fill in variables in its name."""
        return str(self.directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer. Its file comes last of all, which TensorBoard reads by name: where earlier
        ones are of later seconds, as after the clock went back, they get other names."""
        if self._experiment is None:
            earlier = self._event_files()
            with disk_errors(self.directory):
                self._experiment = super().experiment
                is_last = self._event_files()[-1:] != earlier[-1:]
                for number, file in enumerate(() if is_last else earlier, start=1):
                    rest = file.name.removeprefix(EVENTS).partition(".")[2]
                    file.rename(file.with_name(f"{EVENTS}{number:010d}.{rest}"))
        return super().experiment

    def _event_files(self) -> list[Path]:
        """This run's own, in TensorBoard's order."""
        return sorted(
            file
            for file in self.directory.glob(f"{EVENTS}*")
            if file.suffix not in (".board", POSITIONS)
        )

    def _forget_positions(self) -> None:
        for file in self.directory.glob(f"{EVENTS}*{POSITIONS}"):
            file.unlink()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` is complete."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drops what was logged after ``step``, from where a run starts or resumes."""
        # As for SummaryWriter's purge_step, which had to be known before Lightning opens it.
        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(start)
        self._forget_positions()
        if not self.metrics_file.exists():
            return
        lines = self.metrics_file.read_bytes().split(b"\n")[:-1]  # a kill can tear the last one
        entries = [entry(line) for line in lines]
        if None in entries:
            copy = self.metrics_file.with_name(f"{METRICS}.damaged")
            shutil.copyfile(self.metrics_file, copy)
            warnings.warn(f"{self.metrics_file} is damaged: kept as {copy.name}", stacklevel=2)
        kept = [
            line.decode() + "\n"
            for line, found in zip(lines, entries, strict=True)
            if found is not None and found["step"] <= step
        ]
        write_text(self.metrics_file, "".join(kept))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        values.pop("epoch", None)
        if values:
            with disk_errors(self.metrics_file), self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            with disk_errors(self.directory):
                super().log_metrics(values, step)

    @rank_zero_only
    def log_by_position(self, losses: Mapping[str, Mapping[str, list[float]]]) -> None:
        """Loss by position to TensorBoard, in a file of its own: its step is the position."""
        points = (
            (round(position), scalar(f"loss_by_position/validation{name}", loss))
            for name, found in losses.items()
            for position, loss in zip(found["position"], found["loss"], strict=True)
        )
        self.save()
        self._forget_positions()
        own = self._event_files()[-1]
        write_events(own.with_name(own.name + POSITIONS), points)

    @rank_zero_only
    def save(self) -> None:
        """Without Lightning's ``hparams.yaml``."""
        with disk_errors(self.directory):
            self.experiment.flush()

    @rank_zero_only
    def sync(self) -> None:
        """Waits until the disk has what was logged, as a checkpoint of it will."""
        self.save()
        if self.metrics_file.exists():
            with disk_errors(self.metrics_file), self.metrics_file.open("rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success":
            self.save()  # and stays open: losses by position come after the fit
        else:
            with suppress(OSError):  # what went wrong has been said
                super().finalize(status)
