"""Loss of other text at several lengths, measured while a model trains."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer

from ropepp.data.loading.datamodule import RowsDataModule, data_rank_and_size
from ropepp.data.loading.loader import EvalLoader, Rows
from ropepp.data.packing.concat import Concat
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError, at_least
from ropepp.model.sequence import check_length
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.callbacks.step import StepCallback
from ropepp.train.evaluation import Evaluation, on_the_way
from ropepp.train.module import LanguageModel


class SuiteEvaluation(StepCallback):
    """Logs ``suite/loss_LENGTH`` and ``suite/perplexity_LENGTH`` every n optimizer steps.

    Every process makes the same number of forward passes, so that sharded models do not hang, and
    the numbers do not depend on the number of processes beyond rounding. Training goes on as it
    would have without: nothing random is drawn. With ``model.compile`` each length is compiled.

    Args:
        every_n_steps: Optimizer steps between evaluations; 0 is never.
        corpus: Folder of a corpus, tokenized as the training data; its validation split is read.
        lengths: Row lengths in tokens.
        rows: Rows of each length.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        corpus: str | None = None,
        lengths: Sequence[int] = (),
        rows: int = 64,
    ) -> None:
        at_least(0, "suite.", every_n_steps=every_n_steps)
        at_least(1, "suite.", rows=rows)
        if (every_n_steps and not lengths) or min(lengths, default=1) < 1:
            raise InputError(
                f"suite.lengths is {list(lengths)}; give the lengths of the rows, in tokens"
            )
        if every_n_steps and corpus is None:
            raise InputError("suite.corpus is missing; give the folder of a prepared corpus")
        self.every_n_steps = every_n_steps
        self.corpus = corpus
        self.lengths = list(lengths)
        self.rows = rows
        self._texts: dict[int, Rows] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the data and checks it, before any work."""
        if stage != "fit" or not self.every_n_steps:
            return
        assert self.corpus is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        opened = Corpus.open(self.corpus, "validation")
        here, found = data.state_dict().get("tokenizer"), opened.meta.tokenizer_fingerprint
        if here is not None and here != found:
            raise InputError(
                f"suite.corpus is {self.corpus}, made with tokenizer {found[:12]}; the training"
                f" data's is {here[:12]}: prepare the text with that one"
            )
        for T in self.lengths:
            check_length(T, getattr(trainer.strategy, "context_parallel_size", 1))
        masked = getattr(data, "mask_documents", True)
        self._texts = {T: Concat().rows(opened, T, masked) for T in self.lengths}

    def on_step_end(self, trainer: Trainer, pl_module: Any, batch: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            start = time.perf_counter()
            values = self.evaluate(trainer, pl_module)
            seconds = time.perf_counter() - start
            values["utilisation/suite_seconds"] = seconds
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Metrics):
                    callback.leave_out(seconds)

    @torch.no_grad()
    def evaluate(self, trainer: Trainer, module: LanguageModel) -> dict[str, float]:
        """What is logged; equal on all processes, which read as many batches each."""
        data: RowsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        was_training, device = module.training, module.device
        values: dict[str, float] = {}
        module.eval()
        for T, rows in self._texts.items():
            found = Evaluation(device)
            micro = max(1, data.micro_batch_size * data.sequence_length // T)
            for batch in EvalLoader(rows, micro, *data_rank_and_size(trainer), limit=self.rows):
                found.update(module.network, move_data_to_device(on_the_way(batch, device), device))
            result = found.compute()
            values |= {f"suite/{key}_{T}": float(result[key]) for key in ("loss", "perplexity")}
        module.train(was_training)
        return values
