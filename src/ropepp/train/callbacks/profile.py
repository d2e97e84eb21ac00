"""A trace of a few optimizer steps: where the time goes."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.profiler import profile, schedule

from ropepp.errors import at_least
from ropepp.train.callbacks.step import StepCallback


class StepProfile(StepCallback):
    """Writes ``profile/rank-N.json``, to be opened in Perfetto or chrome://tracing.

    Args:
        steps: Optimizer steps to record; 0 records nothing.
        first_step: Step at which recording begins, from start or resume: the first ones compile.
    """

    def __init__(self, steps: int = 0, first_step: int = 10) -> None:
        at_least(0, "profile.", steps=steps, first_step=first_step)
        self.steps = steps
        self.first_step = first_step
        self.directory: Path | None = None  # set by whoever knows the run directory
        self._profile: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.steps and self.directory is not None:
            path = self.directory / f"rank-{trainer.global_rank}.json"
            warmup = min(1, self.first_step)
            wait = self.first_step - warmup
            steps = schedule(wait=wait, warmup=warmup, active=self.steps, repeat=1)
            self._profile = profile(schedule=steps, on_trace_ready=lambda own: _write(own, path))
            self._profile.start()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profile is not None:
            self._profile.stop()  # writes what there is where the run is shorter


def _write(found: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    found.export_chrome_trace(str(temporary))
    temporary.rename(path)
