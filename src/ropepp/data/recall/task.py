"""Multi-query associative recall, a synthetic task (after Zoology, arXiv 2312.04927).

A row begins with n key-value pairs and asks every key once later; the target is the key's value:

    inputs    k1 v1 k2 v2  .  .  . k2  . k1  .
    targets                        v2    v1

Loss and accuracy count the answers alone; they are no inputs, where a dot is filler. A model that
saw earlier answers could strike them off and guess among the values that are left: with 4 pairs it
would be right in 52% of all cases without any recall, and learn nothing more for long.

The ids 0 to V - 1 are cut into three parts: V // 3 keys, V // 3 values, and the rest filler. The
keys of a row are distinct; its values are drawn independently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropepp.data.loading.datamodule import RowsDataModule
from ropepp.data.loading.loader import Rows
from ropepp.data.packing.concat import IGNORE_INDEX, Indices, row_numbers
from ropepp.errors import InputError, at_least

SMALLEST_VOCABULARY = 6  # with fewer ids there is one value, and nothing to recall
TRAIN_STREAM = 0  # validation rows of m times the length are in stream m


@dataclass(eq=False)
class RecallRows:
    """Rows of T = `length` tokens, made when asked for, from seed, stream and row number
    alone.

    The distance of an asked key is how far it lies behind the same key in its pair. The asked keys
    have distinct places, uniform from the end of the pairs to the end of the row, or to column
    `max_distance`, which is that far behind the first pair.

    There are `size` rows of n = `pairs` key-value pairs; streams of a seed have no random number in
    common. Raises an `InputError` that names keys of ``data`` if sizes do not fit each other."""

    length: int
    pairs: int
    vocab_size: int
    size: int
    max_distance: int | None = None
    seed: int = 0
    stream: int = TRAIN_STREAM

    def __post_init__(self) -> None:
        at_least(SMALLEST_VOCABULARY, "data.", vocab_size=self.vocab_size)
        length, pairs, farthest = self.length, self.pairs, self.max_distance
        self.part = keys = self.vocab_size // 3
        if not 1 <= pairs <= keys:
            raise InputError(
                f"data.pairs is {pairs}; with data.vocab_size {self.vocab_size} there are {keys}"
                f" keys: allowed are 1 to {keys}"
            )
        shortest = 3 * pairs  # a pair and its question are three tokens
        if length < shortest:
            raise InputError(
                f"data.sequence_length is {length}; with data.pairs {pairs} it must be at"
                f" least {shortest}"
            )
        if farthest is not None and farthest < shortest - 1:
            raise InputError(
                f"data.max_distance is {farthest}; with data.pairs {pairs} it must be at least"
                f" {shortest - 1}, or null for anywhere in the row"
            )
        end = length if farthest is None else min(length, farthest + 1)
        self.places = end - 2 * pairs
        self._key = np.random.SeedSequence(self.seed).generate_state(2, np.uint64)

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """The rows of these (B,) numbers as int64 tensors (B, T): `input_ids`; `targets`, the value
        where its key is asked and -100 elsewhere; `document_ids`, 0; `positions`, 0 to T - 1.
        Raises an `IndexError` if there is no such row."""
        rows = row_numbers(indices, len(self))
        n, T = self.pairs, self.length
        counts = [self.part, self.places, n, T]
        random = self._random(rows, sum(counts))
        for_keys, for_places, for_values, for_filler = np.split(random, np.cumsum(counts)[:-1], 1)
        keys = _distinct(for_keys, n)
        values = self.part + _below(for_values, self.part)
        asked = 2 * n + _distinct(for_places, n)
        inputs = 2 * self.part + _below(for_filler, self.vocab_size - 2 * self.part)
        inputs[:, 0 : 2 * n : 2] = keys
        inputs[:, 1 : 2 * n : 2] = values
        np.put_along_axis(inputs, asked, keys, axis=1)
        targets = np.full((len(rows), T), IGNORE_INDEX, np.int64)
        np.put_along_axis(targets, asked, values, axis=1)
        return {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "document_ids": torch.zeros(len(rows), T, dtype=torch.int64),
            "positions": torch.arange(T).repeat(len(rows), 1),
        }

    def num_targets(self, indices: Indices) -> int:
        """Number of answers in these rows."""
        return len(indices) * self.pairs

    def _random(self, rows: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
        """(B, count) raw numbers of the generator, see `permutation`. Row and stream are digits of
        its counter; the lowest digit counts up inside the row and has room for 2^64 steps, so that
        rows do not overlap."""
        random = np.empty((len(rows), count), np.uint64)
        for own, row in zip(random, rows.tolist(), strict=True):
            counter = np.array([0, row, self.stream, 0], np.uint64)
            own[:] = np.random.Philox(key=self._key, counter=counter).random_raw(count)
        return random


class RecallDataModule(RowsDataModule):
    """Associative recall, validated in rows of several lengths.

    Rows of m times the length have the same number of pairs, and m times the room for the
    questions: `max_distance`, where given, is m times as large too. They are logged as
    ``validation_2x/accuracy`` and so on.

    Args:
        pairs: Key-value pairs in a row.
        vocab_size: Number of token ids; a third are keys and a third are values.
        max_distance: How far at most a key is asked behind its pair; anywhere in the row unless
            given.
        train_rows: Number of distinct training rows, an epoch.
        validation_rows_per_length: Rows of each length in a validation.
        lengths: Lengths of the validation's rows as multiples of `sequence_length`.
        sizes: See `RowsDataModule`; the seed is also that of the rows.
    """

    def __init__(
        self,
        pairs: int,
        vocab_size: int,
        max_distance: int | None = None,
        train_rows: int = 1_000_000,
        validation_rows_per_length: int = 256,
        lengths: Sequence[int] = (1, 2, 4, 8),
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        rows = {"train_rows": train_rows, "validation_rows_per_length": validation_rows_per_length}
        at_least(1, "data.", **rows)
        if 1 not in lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise InputError(
                f"data.lengths is {list(lengths)}; it must be 1 and other multiples of the length"
                " from 2 on, each once"
            )
        self.pairs = pairs
        self.max_distance = max_distance
        self.train_rows = train_rows
        self.validation_rows_per_length = validation_rows_per_length
        self.lengths = sorted(lengths)
        self._vocab_size = vocab_size
        # A set of rows costs nothing until it is read, and bad sizes are found before any work.
        self._train = self._make(train_rows, 1, TRAIN_STREAM)
        self._validation = {
            multiple: self._make(validation_rows_per_length, multiple, stream=multiple)
            for multiple in self.lengths
        }

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def open(self, split: str) -> Rows:
        return self._train if split == "train" else self._validation[1]

    def evaluation_sets(self) -> dict[str, Rows]:
        """Rows by length: "" of the training length, "_2x" twice as long, ..."""
        return {
            "" if multiple == 1 else f"_{multiple}x": rows
            for multiple, rows in self._validation.items()
        }

    def _make(self, size: int, multiple: int, stream: int) -> RecallRows:
        return RecallRows(
            self.sequence_length * multiple,
            self.pairs,
            self.vocab_size,
            size,
            None if self.max_distance is None else self.max_distance * multiple,
            self.seed,
            stream,
        )


def _distinct(random: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """(B, N) random numbers to (B, count) distinct ones below N, in random order."""
    return np.argsort(random, axis=1, kind="stable")[:, :count]


def _below(random: NDArray[np.uint64], end: int) -> NDArray[np.int64]:
    """Random numbers below `end`."""
    return (random % np.uint64(end)).astype(np.int64)
