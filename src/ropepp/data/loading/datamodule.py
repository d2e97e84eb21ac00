"""Prepared corpora for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

import ropepp.data.packing.best_fit  # noqa: F401 (makes its short class names known)
from ropepp.data.loading.loader import EpochOrder, EvalLoader, Order, Rows, TrainLoader
from ropepp.data.loading.mixture import ChosenRows, MixtureRows, Schedule
from ropepp.data.packing.concat import Concat, Packing
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError


class RowsDataModule(pl.LightningDataModule):
    """Feeds rows in global batches: the same samples in the same order at every process count.

    Sub-classes provide the rows of both splits in `open`. Gradient accumulation and
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

    def order(self) -> Order:
        """Which row of "train" each training sample is."""
        return EpochOrder(len(self.rows["train"]), self.seed)

    def setup(self, stage: str) -> None:
        splits = ("train", "validation") if stage == "fit" else ("validation",)
        self.rows = {split: self.open(split) for split in splits}
        if stage != "fit" or self.trainer is None:
            return
        accumulation = self.train_dataloader().accumulation
        check_accumulation(self.trainer.accumulate_grad_batches, accumulation)
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
            order=self.order(),
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


def check_accumulation(given: int, accumulation: int) -> None:
    """Raises an `InputError` if the trainer was told another number of micro-batches a step."""
    if given not in (1, accumulation):
        raise InputError(
            f"trainer.accumulate_grad_batches is {given}; it follows from data.global_batch_size "
            f"and is {accumulation} here: leave it out"
        )


def data_part(trainer: pl.Trainer) -> tuple[int, int]:
    """Which part of how many this process reads: processes that share rows read the same."""
    strategy = trainer.strategy
    return (
        getattr(strategy, "data_rank", trainer.global_rank),
        getattr(strategy, "data_size", trainer.world_size),
    )


class _PreparedDataModule(RowsDataModule):
    """What is common to rows of prepared corpora; for the arguments see the sub-classes, those in
    ``sizes`` are `RowsDataModule`'s."""

    def __init__(
        self,
        packing: Packing,
        mask_documents: bool,
        extrapolation: Sequence[int],
        verify: bool,
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        if any(multiple < 2 for multiple in extrapolation):
            raise InputError(
                f"data.extrapolation is {list(extrapolation)}; its multiples must be at least 2"
            )
        self.packing = packing
        self.mask_documents = mask_documents
        self.extrapolation = list(extrapolation)
        self.verify = verify

    @property
    def folders(self) -> list[str]:
        """Folders of the prepared corpora."""
        raise TypeError(f"{type(self).__name__} has no corpora")

    @property
    def recipe(self) -> str:
        """How samples are made of the text; by another recipe a sample's number means another."""
        return f"{self.packing}, rows of {self.sequence_length}"

    @property
    def vocab_size(self) -> int:
        return max(corpus.meta.vocab_size for corpus in self._corpora("train"))

    def open(self, split: str) -> Rows:
        corpora = self._corpora(split)
        if self.verify:
            for corpus in corpora:
                corpus.verify()
        packing = self.packing if split == "train" else Concat()
        return self._mixed(self._rows(corpora, packing, self.sequence_length), split)

    def evaluation_sets(self) -> dict[str, Rows]:
        sets = super().evaluation_sets()
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return sets
        for multiple in self.extrapolation:
            corpora, length = self._corpora("validation"), multiple * self.sequence_length
            rows = self._rows(corpora, Concat(), length)
            sets[f"_{multiple}x"] = self._mixed(rows, "validation")
        return sets

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer a checkpoint's model was trained with, and how its samples were made."""
        return {"tokenizer": self._tokenizer(), "recipe": self.recipe}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises an `InputError` if the corpora have another tokenizer than the checkpoint's; warns
        if the samples are made in another way."""
        saved, here = state_dict["tokenizer"], self._tokenizer()
        if saved != here:
            raise InputError(
                f"data.corpus is {self.folders[0]}, made with tokenizer {here[:12]}; the "
                f"checkpoint's model was trained with tokenizer {saved[:12]}: prepare the text "
                "with that one"
            )
        recipe = state_dict.get("recipe", self.recipe)
        if recipe != self.recipe:
            pl.utilities.rank_zero_warn(
                f"data is {self.recipe} here and was {recipe} in the checkpoint: the run goes on "
                "after as many samples as it had, but these were others"
            )

    def _corpora(self, split: str) -> list[Corpus]:
        """The corpora, after checking that one tokenizer made them."""
        corpora = [Corpus.open(folder, split) for folder in self.folders]
        first = corpora[0]
        for other in corpora[1:]:
            a, b = (corpus.meta.tokenizer_fingerprint for corpus in (first, other))
            if a != b:
                raise InputError(
                    f"{first.folder} was made with tokenizer {a[:12]}, {other.folder} with"
                    f" {b[:12]}: a mixture needs one tokenizer, prepare one of them again"
                )
        return corpora

    def _rows(self, corpora: list[Corpus], packing: Packing, length: int) -> list[Rows]:
        return [packing.rows(corpus, length, self.mask_documents) for corpus in corpora]

    def _mixed(self, rows: list[Rows], split: str) -> Rows:
        """Rows of all corpora together."""
        return rows[0]

    def _tokenizer(self) -> str:
        return self._corpora("train")[0].meta.tokenizer_fingerprint


class CorpusDataModule(_PreparedDataModule):
    """Rows of a corpus made by ``ropepp prepare``.

    Args:
        corpus: Folder of the prepared corpus.
        sequence_length: Tokens in a row (T).
        global_batch_size: Rows in an optimizer step, over all processes and micro-batches.
        micro_batch_size: Rows in one forward pass of one process.
        packing: How documents become training rows. Validation is always on ``Concat``, so that
            losses can be compared between packings.
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
        packing: Packing = Concat(),  # noqa: B008 (frozen)
        mask_documents: bool = True,
        validate_every_n_steps: int = 500,
        validation_rows: int | None = None,
        extrapolation: Sequence[int] = (),
        num_workers: int = 0,
        verify: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            packing,
            mask_documents,
            extrapolation,
            verify,
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            validate_every_n_steps=validate_every_n_steps,
            validation_rows=validation_rows,
            num_workers=num_workers,
            seed=seed,
        )
        self.corpus = corpus

    @property
    def folders(self) -> list[str]:
        return [self.corpus]


class MixtureDataModule(_PreparedDataModule):
    """Rows of several prepared corpora in fixed proportions, see `ropepp.data.loading.mixture`.

    After any number of rows, each corpus has had its share to within one row. Each has epochs of
    its own; the number of rows read is still all that a run needs to go on. All need one tokenizer.

    Validation is on as many rows of each corpus's validation split as the proportions allow, and
    under the name ``validation_FOLDER`` on those of each corpus alone.

    Args:
        corpora: Weight of each corpus by its folder; they need not sum to 1. The order of the
            folders is part of the order of rows.
        sequence_length: Tokens in a row (T).
        global_batch_size: Rows in an optimizer step, over all processes and micro-batches.
        micro_batch_size: Rows in one forward pass of one process.
        packing: How documents become training rows. Validation is always on ``Concat``, so that
            losses can be compared between packings.
        mask_documents: Whether a token sees only its own document; the same for every variant.
        validate_every_n_steps: Optimizer steps between validations; 0 validates at the end alone.
        validation_rows: Rows in a validation during training, of the mixture and of each corpus;
            all of them unless given.
        extrapolation: Multiples of the row length at which the trained model is evaluated on the
            mixture as well, under the names ``validation_2x`` and so on; not during training.
        num_workers: Processes that read ahead; 0 is fastest for a memory map.
        verify: Whether to compare the corpora with their checksums first, which reads all of them.
        seed: Seed of the order of rows.
    """

    def __init__(
        self,
        corpora: dict[str, float],
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        packing: Packing = Concat(),  # noqa: B008 (frozen)
        mask_documents: bool = True,
        validate_every_n_steps: int = 500,
        validation_rows: int | None = None,
        extrapolation: Sequence[int] = (),
        num_workers: int = 0,
        verify: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            packing,
            mask_documents,
            extrapolation,
            verify,
            sequence_length=sequence_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            validate_every_n_steps=validate_every_n_steps,
            validation_rows=validation_rows,
            num_workers=num_workers,
            seed=seed,
        )
        self.corpora = corpora
        self.schedule = Schedule.of(list(corpora.values()))
        self.names = [Path(folder).name for folder in corpora]
        taken = [*self.names, *(f"{multiple}x" for multiple in self.extrapolation)]
        if "" in taken or len(set(taken)) < len(taken):
            raise InputError(
                f"data.corpora is {corpora}; the last parts of the paths name the validation sets"
                " and must differ from each other and from the names of data.extrapolation"
            )

    @property
    def folders(self) -> list[str]:
        return list(self.corpora)

    @property
    def recipe(self) -> str:
        weights = dict(zip(self.names, self.corpora.values(), strict=True))
        return f"{super().recipe}, mixture of {weights}"

    def order(self) -> Order:
        return cast(MixtureRows, self.rows["train"]).order(self.seed)

    def evaluation_sets(self) -> dict[str, Rows]:
        sets = super().evaluation_sets()
        parts = cast(MixtureRows, cast(ChosenRows, sets[""]).rows).parts
        return sets | {f"_{name}": rows for name, rows in parts.items()}

    def _mixed(self, rows: list[Rows], split: str) -> Rows:
        mixture = MixtureRows(dict(zip(self.names, rows, strict=True)), self.schedule)
        return mixture if split == "train" else mixture.in_proportion()
