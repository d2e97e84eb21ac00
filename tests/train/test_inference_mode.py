"""Evaluation before training where Lightning turns gradients off as it does over NCCL."""

import os
from pathlib import Path

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


def evaluate_and_train(corpus: str) -> None:
    setattr(utilities, GLOO, lambda: False)
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    trainer = pl.Trainer(
        **{**TRAINER_DEFAULTS, "max_steps": 3},
        strategy=FSDP2Strategy(),
        accelerator="cpu",
        devices=dist.get_world_size(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = LanguageModel(ModelConfig(257, 32, 2, 4, 2, 48), RoPEppEC(), AdamW(lr=0.01))
    data = CorpusDataModule(corpus, sequence_length=32, global_batch_size=4, micro_batch_size=2)
    losses = []
    for step in (trainer.validate, trainer.fit, trainer.validate):
        trainer.limit_val_batches = 1.0  # training does without a validation
        step(model, datamodule=data)
        losses.append(float(trainer.callback_metrics.get("validation/loss", 0.0)))
    assert losses[2] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_evaluate_train_evaluate(world: int, corpus: Path) -> None:
    spawn(world, evaluate_and_train, str(corpus))


def test_commands(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilities, GLOO, lambda: False)
    args = arguments(corpus, tmp_path, "fresh", trainer__strategy="fsdp2", trainer__max_steps=2)
    steps = [flag for flag in args if "checkpoint." in flag]  # of fit alone
    args = [flag for flag in args if flag not in steps]
    assert main(["validate", *args[1:], "--debug"]) == 0
    assert main([*args, "--debug"]) == 0
