"""Evaluation before training where Lightning turns gradients off as it does over NCCL."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from lightning.pytorch.loops import utilities

from helpers.fit_runs import arguments
from helpers.processes import spawn
from ropepp.cli import main
from ropepp.data.loading.datamodule import CorpusDataModule
from ropepp.model import ModelConfig
from ropepp.model.positions import RoPEppEC
from ropepp.train.lightning_cli import TRAINER_DEFAULTS
from ropepp.train.module import LanguageModel
from ropepp.train.optim import AdamW
from ropepp.train.strategy import FSDP2Strategy

# What Lightning asks to find gloo, for which alone it leaves inference mode.
GLOO = "_distributed_is_initialized"


def evaluate_and_train(corpus: str, folder: str) -> None:
    setattr(utilities, GLOO, lambda: False)
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    data = CorpusDataModule(corpus, sequence_length=32, global_batch_size=4, micro_batch_size=2)

    def start() -> tuple[pl.Trainer, LanguageModel]:
        model = LanguageModel(ModelConfig(257, 32, 2, 4, 2, 48), RoPEppEC(), AdamW(lr=0.01))
        trainer = pl.Trainer(
            **{**TRAINER_DEFAULTS, "max_steps": 3},
            strategy=FSDP2Strategy(),
            accelerator="cpu",
            devices=dist.get_world_size(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        return trainer, model

    def loss(trainer: pl.Trainer, model: LanguageModel, **options: Any) -> float:
        trainer.limit_val_batches = 1.0  # training does without a validation
        trainer.validate(model, datamodule=data, **options)
        return float(trainer.callback_metrics["validation/loss"])

    trainer, model = start()
    before = loss(trainer, model)
    trainer.fit(model, datamodule=data)
    after = loss(trainer, model)
    assert after < before
    trainer.save_checkpoint(Path(folder, "trained.ckpt"))
    other = start()
    assert loss(*other) == before
    assert loss(*other, ckpt_path=Path(folder, "trained.ckpt")) == after  # nothing is left over


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_evaluate_train_evaluate(world: int, corpus: Path, tmp_path: Path) -> None:
    spawn(world, evaluate_and_train, str(corpus), str(tmp_path))


def test_commands(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilities, GLOO, lambda: False)
    args = arguments(corpus, tmp_path, "fresh", trainer__strategy="fsdp2", trainer__max_steps=2)
    steps = [flag for flag in args if "checkpoint." in flag]  # of fit alone
    args = [flag for flag in args if flag not in steps]
    assert main(["validate", *args[1:], "--debug"]) == 0
    assert main([*args, "--debug"]) == 0
