"""Writes what ``ropepp predict`` computes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """One ``rank-R-batch-N.npz`` for each batch, with input_ids, targets and nll, each (B, T)."""

    def __init__(self, directory: Path) -> None:
        super().__init__(write_interval="batch")
        self.directory = directory

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        arrays = {key: value.cpu().numpy() for key, value in prediction.items()}
        np.savez(self.directory / f"rank-{trainer.global_rank}-batch-{batch_idx:06d}.npz", **arrays)
