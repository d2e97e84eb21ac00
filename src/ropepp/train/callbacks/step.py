"""What happens once an optimizer step, of which a batch may be a part."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """Calls `on_step_end` after each optimizer step; sub-classes may extend both hooks here."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, batch)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """After ``trainer.global_step`` steps; ``batch`` is the last one's last micro-batch."""
