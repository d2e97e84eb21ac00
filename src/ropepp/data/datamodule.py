"""Prepared corpora for Lightning."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from ropepp.data.corpus import Corpus
from ropepp.data.loader import EvalLoader, Rows, TrainLoader
from ropepp.data.packing import ConcatRows
from ropepp.errors import InputError


class RowsDataModule(pl.LightningDataModule):
    """Feeds rows in global batches: the same samples in the same order at every process count.

    Sub-classes provide ``train_rows`` and ``validation_rows`` in `open`. Gradient accumulation and
    the interval of validations follow from the sizes here, and are set on the trainer.

    Args:
        sequence_length: Tokens in a row (T).
        global_batch_size: Rows in an optimizer step, over all processes and micro-batches.
        micro_batch_size: Rows in one forward pass of one process.
        validate_every_n_steps: Optimizer steps between validations; 0 validates at the end alone.
        validation_rows: Rows in a validation during training; all of them unless given.
        num_workers: Processes that read ahead; 0 is fastest for a memory map.
        seed: Seed of the order of rows.
    """

    def __init__(
        self,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        validate_every_n_steps: int = 500,
        validation_rows: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"data.{name} is {value}; it must be at least 1")
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.validate_every_n_steps = validate_every_n_steps
        self.validation_rows = validation_rows
        self.num_workers = num_workers
        self.seed = seed
        self.rows: dict[str, Rows] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the data may hold."""
        raise TypeError(f"{type(self).__name__} does not say its vocab_size")

    def open(self, split: str) -> Rows:
        """The rows of "train" or "validation"."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def setup(self, stage: str) -> None:
        splits = ("train", "validation") if stage == "fit" else ("validation",)
        self.rows = {split: self.open(split) for split in splits}
        if stage != "fit" or self.trainer is None:
            return
        accumulation = self.train_dataloader().accumulation
        if self.trainer.accumulate_grad_batches not in (1, accumulation):
            raise InputError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; "
                f"it follows from data.global_batch_size and is {accumulation} here: leave it out"
            )
        self.trainer.accumulate_grad_batches = accumulation
        self.trainer.check_val_every_n_epoch = None
        if self.validate_every_n_steps:
            self.trainer.val_check_interval = self.validate_every_n_steps * accumulation
        else:
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(
            self.rows["train"],
            self.global_batch_size,
            self.micro_batch_size,
            *self._part(),
            seed=self.seed,
            num_workers=self.num_workers,
        )

    @property
    def rows_per_batch(self) -> int:
        """Rows in the micro-batches that all processes read at a time."""
        return self.micro_batch_size * self._part()[1]

    def _part(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else data_part(self.trainer)

    @property
    def evaluation_names(self) -> list[str]:
        """Suffixes of the evaluation sets' names in the log, the main one's empty."""
        return list(self.evaluation_sets())

    def evaluation_sets(self) -> dict[str, Rows]:
        """Rows to evaluate on by suffix, "" first."""
        return {"": self.rows["validation"]}

    def val_dataloader(self) -> list[EvalLoader]:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return self._evaluation(self.validation_rows if fitting else None)

    def test_dataloader(self) -> list[EvalLoader]:
        return self._evaluation(None)

    def predict_dataloader(self) -> EvalLoader:
        return self._evaluation(None)[0]

    def _evaluation(self, limit: int | None) -> list[EvalLoader]:
        return [
            EvalLoader(
                rows,
                # Longer rows, fewer of them: about as much memory.
                max(1, self.micro_batch_size * self.sequence_length // rows.length),
                *self._part(),
                limit=limit,
            )
            for rows in self.evaluation_sets().values()
        ]


def data_part(trainer: pl.Trainer) -> tuple[int, int]:
    """Which part of how many this process reads: processes that share rows read the same."""
    strategy = trainer.strategy
    return (
        getattr(strategy, "data_rank", trainer.global_rank),
        getattr(strategy, "data_size", trainer.world_size),
    )


class CorpusDataModule(RowsDataModule):
    """Rows of a corpus made by ``ropepp prepare``.

    Args:
        corpus: Folder of the prepared corpus.
        sequence_length: Tokens in a row (T).
        global_batch_size: Rows in an optimizer step, over all processes and micro-batches.
        micro_batch_size: Rows in one forward pass of one process.
        mask_documents: Whether a token sees only its own document; the same for every variant.
        validate_every_n_steps: Optimizer steps between validations; 0 validates at the end alone.
        validation_rows: Rows in a validation during training; all of them unless given.
        extrapolation: Multiples of the row length at which the trained model is evaluated as well,
            under the names ``validation_2x`` and so on; not during training.
        num_workers: Processes that read ahead; 0 is fastest for a memory map.
        verify: Whether to compare the corpus with its checksums first, which reads all of it.
        seed: Seed of the order of rows.
    """

    def __init__(
        self,
        corpus: str,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        mask_documents: bool = True,
        validate_every_n_steps: int = 500,
        validation_rows: int | None = None,
        extrapolation: Sequence[int] = (),
        num_workers: int = 0,
        verify: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sequence_length,
            global_batch_size,
            micro_batch_size,
            validate_every_n_steps,
            validation_rows,
            num_workers,
            seed,
        )
        if any(multiple < 2 for multiple in extrapolation):
            raise InputError(
                f"data.extrapolation is {list(extrapolation)}; its multiples must be at least 2"
            )
        self.corpus = corpus
        self.extrapolation = list(extrapolation)
        self.mask_documents = mask_documents
        self.verify = verify

    @property
    def vocab_size(self) -> int:
        return Corpus.open(self.corpus, "train").meta.vocab_size

    def open(self, split: str) -> Rows:
        corpus = Corpus.open(self.corpus, split)
        if self.verify:
            corpus.verify()
        return ConcatRows(corpus, self.sequence_length, mask_documents=self.mask_documents)

    def evaluation_sets(self) -> dict[str, Rows]:
        sets = super().evaluation_sets()
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return sets
        corpus = Corpus.open(self.corpus, "validation")
        for multiple in self.extrapolation:
            length = multiple * self.sequence_length
            sets[f"_{multiple}x"] = ConcatRows(corpus, length, self.mask_documents)
        return sets

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer a checkpoint's model was trained with."""
        return {"tokenizer": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises an `InputError` if the corpus has another tokenizer than the checkpoint's."""
        saved, here = state_dict["tokenizer"], self._fingerprint()
        if saved != here:
            raise InputError(
                f"data.corpus is {self.corpus}, made with tokenizer {here[:12]}; the checkpoint's "
                f"model was trained with tokenizer {saved[:12]}: prepare the text with that one"
            )

    def _fingerprint(self) -> str:
        return Corpus.open(self.corpus, "train").meta.tokenizer_fingerprint
