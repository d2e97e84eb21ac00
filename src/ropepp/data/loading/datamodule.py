"""Prepared corpora for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

import ropepp.data.packing.best_fit  # noqa: F401 (makes its short class names known)
from ropepp.data.loading.loader import EpochOrder, EvalLoader, Order, Rows, TrainLoader
from ropepp.data.loading.mixture import ChosenRows, MixtureOrder, MixtureRows, MixtureSchedule
from ropepp.data.packing.concat import Concat, Packing
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError, at_least

MAX_WORKERS = 64


class RowsDataModule(pl.LightningDataModule):
    """Feeds rows in global batches: the same samples in the same order at every process count.

    Sub-classes provide the rows of both splits in `open`. Gradient accumulation and
    the interval of validations follow from the sizes here, and are set on the trainer.

    Args:
        sequence_length: Tokens in a row (T).
        global_batch_size: Rows in an optimizer step, over all processes and micro-batches.
        micro_batch_size: Rows in one forward pass of one process; of longer rows as many fewer.
        validate_every_n_steps: Optimizer steps between validations; 0 validates at the end alone.
        num_workers: Threads that read ahead, up to 64; 0 is fastest from the page cache.
        seed: Seed of the order of rows.
    """

    validation_rows: int | None = None  # in a validation during training; all of them unless given

    def __init__(
        self,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        validate_every_n_steps: int = 500,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(2, "data.", sequence_length=sequence_length)
        at_least(1, "data.", global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
        at_least(0, "data.", validate_every_n_steps=validate_every_n_steps, num_workers=num_workers)
        at_least(0, "data.", seed=seed)
        if num_workers > MAX_WORKERS:
            raise InputError(f"data.num_workers is {num_workers}; allowed are up to {MAX_WORKERS}")
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.validate_every_n_steps = validate_every_n_steps
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
            *data_rank_and_size(self.trainer),
            num_workers=self.num_workers,
            order=self.order(),
        )

    @property
    def rows_per_batch(self) -> int:
        """Rows in the micro-batches that all processes read at a time."""
        return self.micro_batch_size * data_rank_and_size(self.trainer)[1]

    @property
    def evaluation_names(self) -> list[str]:
        """Suffixes of the evaluation sets' names in the log, the main one's empty."""
        return list(self.evaluation_sets())

    def evaluation_sets(self) -> dict[str, Rows]:
        """Rows to evaluate on by suffix, "" first."""
        return {"": self.rows["validation"]}

    def val_dataloader(self) -> list[EvalLoader]:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return [
            EvalLoader(
                rows,
                # Longer rows, fewer of them: about as much memory.
                max(1, self.micro_batch_size * self.sequence_length // rows.length),
                *data_rank_and_size(self.trainer),
                limit=self.validation_rows if fitting else None,
            )
            for rows in self.evaluation_sets().values()
        ]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> EvalLoader:
        return self.val_dataloader()[0]


def check_accumulation(given: int, accumulation: int) -> None:
    """Raises an `InputError` if the trainer was told another number of micro-batches a step."""
    if given not in (1, accumulation):
        raise InputError(
            f"trainer.accumulate_grad_batches is {given}; it follows from data.global_batch_size "
            f"and is {accumulation} here: leave it out"
        )


def data_rank_and_size(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Which part of how many this process reads: processes that share rows read the same."""
    if trainer is None:
        return 0, 1
    strategy = trainer.strategy
    rank = getattr(strategy, "data_rank", trainer.global_rank)
    return rank, getattr(strategy, "data_size", trainer.world_size)


class CorpusDataModule(RowsDataModule):
    """Rows of a corpus made by ``ropepp prepare``, or of several in fixed proportions, see
    `ropepp.data.loading.mixture`.

    After any number of rows, each of several corpora has had its share to within one row. Each has
    epochs of its own; the number of rows read is still all that a run needs to go on. All need one
    tokenizer. Validation is then on as many rows of each corpus's validation split as the
    proportions allow, and under the name ``validation_FOLDER`` on those of each corpus alone.

    Args:
        corpus: Folder of the prepared corpus; or the weight of each corpus by its folder. Weights
            need not sum to 1, and the order of the folders is part of the order of rows.
        packing: How documents become training rows. Validation is always on ``Concat``, so that
            losses can be compared between packings.
        mask_documents: Whether a token sees only its own document; the same for every variant.
        validation_rows: Rows in a validation during training, of all corpora together and of each;
            all of them unless given.
        extrapolation: Multiples of the row length at which the trained model is evaluated as well,
            under the names ``validation_2x`` and so on; not during training.
        verify: Whether to compare the corpus with its checksums first, which reads all of it.
        sizes: See `RowsDataModule`.
    """

    def __init__(
        self,
        corpus: str | dict[str, float],
        packing: Packing = Concat(),  # noqa: B008 (frozen)
        mask_documents: bool = True,
        validation_rows: int | None = None,
        extrapolation: Sequence[int] = (),
        verify: bool = False,
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        at_least(1, "data.", validation_rows=validation_rows)
        self.validation_rows = validation_rows
        if any(multiple < 2 for multiple in extrapolation):
            raise InputError(
                f"data.extrapolation is {list(extrapolation)}; its multiples must be at least 2"
            )
        self.corpus = corpus
        self.packing = packing
        self.mask_documents = mask_documents
        self.extrapolation = list(extrapolation)
        self.verify = verify
        weights = {corpus: 1.0} if isinstance(corpus, str) else corpus
        self.folders = list(weights)
        self._opened: dict[str, list[Corpus]] = {}
        self.schedule = MixtureSchedule.of(list(weights.values()))
        self.weights = {Path(folder).name: weight for folder, weight in weights.items()}
        taken = [*self.weights, *(f"{multiple}x" for multiple in self.extrapolation)]
        differ = "" not in taken and len(set(taken)) == len(weights) + len(self.extrapolation)
        if len(weights) > 1 and not differ:
            raise InputError(
                f"data.corpus is {corpus}; the last parts of the paths name the validation sets"
                " and must differ from each other and from the names of data.extrapolation"
            )

    @property
    def recipe(self) -> str:
        """How samples are made of the text; by another recipe a sample's number means another."""
        mixture = f", mixture of {self.weights}" if len(self.folders) > 1 else ""
        unmasked = "" if self.mask_documents else ", documents not masked"
        return f"{self.packing}, rows of {self.sequence_length}{mixture}{unmasked}"

    @property
    def vocab_size(self) -> int:
        return max(corpus.meta.vocab_size for corpus in self._corpora("train"))

    def open(self, split: str) -> Rows:
        if self.verify:
            for corpus in self._corpora(split):
                corpus.verify()
        return self._rows(split, self.packing if split == "train" else Concat())

    def order(self) -> Order:
        rows = self.rows["train"]
        return MixtureOrder(rows, self.seed) if isinstance(rows, MixtureRows) else super().order()

    def evaluation_sets(self) -> dict[str, Rows]:
        sets = super().evaluation_sets()
        if self.trainer is None or self.trainer.state.fn != "fit":
            for multiple in self.extrapolation:
                sets[f"_{multiple}x"] = self._rows("validation", Concat(), multiple)
        if isinstance(chosen := sets[""], ChosenRows):
            parts = cast(MixtureRows, chosen.rows).parts
            sets |= {f"_{name}": rows for name, rows in parts.items()}
        return sets

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer a checkpoint's model was trained with, and how its samples were made."""
        metas = [corpus.meta for corpus in self._corpora("train")]
        text = [meta.shards_sha256 for meta in metas]
        return {"tokenizer": metas[0].tokenizer_fingerprint, "recipe": self.recipe, "text": text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises an `InputError` if the corpora have another tokenizer than the checkpoint's; warns
        if the samples are made in another way."""
        here = self.state_dict()
        saved = here | state_dict  # older ones do not name their text
        if saved["tokenizer"] != here["tokenizer"]:
            raise InputError(
                f"data.corpus is {self.folders[0]}, made with tokenizer {here['tokenizer'][:12]}; "
                f"the checkpoint's model was trained with tokenizer {saved['tokenizer'][:12]}: "
                "prepare the text with that one"
            )
        words = {
            "recipe": f"data is {self.recipe} here and was {saved['recipe']} in the checkpoint",
            "text": f"data.corpus is {self.corpus}, whose text is not the checkpoint's",
        }
        for key, what in words.items():
            if saved[key] != here[key]:
                pl.utilities.rank_zero_warn(
                    f"{what}: the run goes on after as many samples as it had, but these were "
                    "others"
                )

    def _corpora(self, split: str) -> list[Corpus]:
        """The corpora, opened once, after checking that one tokenizer made them."""
        if split in self._opened:
            return self._opened[split]
        first, *others = corpora = [Corpus.open(folder, split) for folder in self.folders]
        for other in others:
            a, b = (corpus.meta.tokenizer_fingerprint for corpus in (first, other))
            if a != b:
                raise InputError(
                    f"{first.folder} was made with tokenizer {a[:12]}, {other.folder} with"
                    f" {b[:12]}: a mixture needs one tokenizer, prepare one of them again"
                )
        self._opened[split] = corpora
        return corpora

    def _rows(self, split: str, packing: Packing, multiple: int = 1) -> Rows:
        """Rows of all corpora together; those of one alone need no second copy of each batch."""
        length = multiple * self.sequence_length
        corpora = self._corpora(split)
        rows: list[Rows] = [packing.rows(own, length, self.mask_documents) for own in corpora]
        if len(rows) == 1:
            return rows[0]
        mixture = MixtureRows(dict(zip(self.weights, rows, strict=True)), self.schedule)
        return mixture if split == "train" else mixture.in_proportion()
