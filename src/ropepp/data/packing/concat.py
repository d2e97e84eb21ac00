"""Token files to rows of equal length: what all packings share, and documents one after another.

Other packings are in `ropepp.data.packing.best_fit`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

IGNORE_INDEX = -100
PADDING_DOCUMENT = -1
KEYS = ("input_ids", "targets", "document_ids", "positions")
PERCENTILES = (0, 10, 25, 50, 75, 90, 100)

Indices = NDArray[np.int64] | Sequence[int]


class Pieces(NamedTuple):
    """The pieces of documents in some rows, one row after another."""

    rows: NDArray[np.int64]  # (P,) which of these rows each piece is in, ascending
    starts: NDArray[np.int64]  # (P,) a piece's first token in the corpus
    sizes: NDArray[np.int64]  # (P,) its number of tokens, at least 1; up to T + 1 in a row


class PackedRows(ABC):
    """Rows of T = `length` tokens cut from a corpus; sub-classes say which tokens a row holds.

    A row reads T + 1 tokens, so that the last input has its target. The first token of a document
    is no target. With `mask_documents` documents and positions are numbered inside a row; otherwise
    the row counts as one document, and attention may cross documents. The targets are the same.
    Raises an `InputError` if `length` is below 1 or exceeds the corpus."""

    def __init__(self, corpus: Corpus, length: int, mask_documents: bool = True) -> None:
        tokens = len(corpus.tokens)
        if not 1 <= length <= tokens or tokens < 2:
            raise InputError(
                f"length is {length}; the {corpus.meta.split} split of {corpus.folder} has"
                f" {tokens} tokens: allowed are 1 to {tokens}, and at least 2 tokens"
            )
        self.corpus = corpus
        self.length = length
        self.mask_documents = mask_documents

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def _pieces(self, rows: NDArray[np.int64]) -> Pieces:
        """What these rows hold; none is empty."""

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """The rows of these (B,) numbers as int64 tensors (B, T): `input_ids`, padding is 0;
        `targets`, the next token, or -100 where that begins another document or does not exist;
        `document_ids`, 0, 1, ... inside the row, padding is -1; `positions`, from 0 in every
        document and row, padding is 0. Raises an `IndexError` if there is no such row."""
        numbers = row_numbers(indices, len(self))
        # One allocation: four of this size cost up to three times as much in page faults.
        arrays = np.empty((len(KEYS), len(numbers), self.length), np.int64)
        inputs, targets, documents, positions = arrays
        rows, columns, filled = self._read(numbers, inputs, targets)
        targets[rows, columns - 1] = IGNORE_INDEX
        documents[:] = 0
        positions[:] = 1
        positions[:, 0] = 0
        if self.mask_documents:
            inside = columns < self.length
            _restart(documents, positions, rows[inside], columns[inside])
        np.cumsum(positions, axis=1, out=positions)
        for row in np.flatnonzero(filled < self.length).tolist():
            padding = slice(filled[row], None)
            targets[row, padding] = IGNORE_INDEX
            documents[row, padding] = PADDING_DOCUMENT
            positions[row, padding] = 0
        return {key: torch.from_numpy(array) for key, array in zip(KEYS, arrays, strict=True)}

    def num_targets(self, indices: Indices) -> int:
        """Number of targets other than -100 in the rows, from the document offsets alone. Raises an
        `IndexError` if there is no such row."""
        return int((self._pieces(row_numbers(indices, len(self))).sizes - 1).sum())

    def summary(self) -> dict[str, Any]:
        """What the packing costs, as plain values: numbers of `rows`, of their `length`, of the
        corpus's `documents` and `tokens`; then shares: `tokens_lost`, of the corpus's tokens, those
        in no row; `places_padded`, of all inputs of all rows, those without a token;
        `documents_split`, of the corpus's documents, those that lie in several rows;
        `tokens_split`, of its tokens, those of such documents. `document_lengths` has the
        percentiles of the lengths of the documents used, see `length_percentiles`."""
        lengths, tokens, T = np.diff(self.corpus.offsets), len(self.corpus.tokens), self.length
        rows, starts, sizes = self._pieces(np.arange(len(self)))
        held = np.bincount(rows, sizes).astype(np.int64)
        # A first token behind a row's last input is no target: the row does not use it.
        used = (sizes > 1) | (held[rows] <= T) | (rows == np.append(rows[1:], -1))
        documents = np.searchsorted(self.corpus.offsets, starts, side="right") - 1
        pieces = np.bincount(documents[used], minlength=len(lengths))
        split = np.bincount(documents[sizes > 1], minlength=len(lengths)) > 1
        # Pieces of a document share their ends.
        read = sizes[used].sum() - np.maximum(pieces - 1, 0).sum()
        places = len(self) * T
        return {
            "rows": len(self),
            "length": T,
            "documents": len(lengths),
            "tokens": tokens,
            "tokens_lost": int(tokens - read) / tokens,
            "places_padded": int(places - np.minimum(held, T).sum()) / places,
            "documents_split": float(split.mean()),
            "tokens_split": int(lengths[split].sum()) / tokens,
            "document_lengths": length_percentiles(lengths[pieces > 0]),
        }

    def _read(
        self, rows: NDArray[np.int64], inputs: NDArray[Any], targets: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Writes the tokens of these rows as inputs (B, T) and, one further on, as targets (B, T);
        inputs after a row's last token are 0. Returns (E,) which row each end of a piece is in,
        ascending; (E,) the place after the piece's last token, 1 to T; (B,) number of inputs of
        each row that are no padding."""
        row_of, starts, sizes = self._pieces(rows)
        first = np.searchsorted(row_of, np.arange(len(rows)))
        ends = np.append(0, np.cumsum(sizes))
        columns = ends[1:] - ends[first][row_of]
        # Each token is copied once from where it may be slow to read, neighbours together.
        apart = np.ones(len(row_of), np.bool_)
        apart[1:] = (np.diff(row_of) > 0) | (starts[1:] != starts[:-1] + sizes[:-1])
        begins = np.flatnonzero(apart)
        counts = np.diff(ends[np.append(begins, len(sizes))])
        places = (row_of * (self.length + 1) + columns - sizes)[begins]
        both = np.zeros((len(rows), self.length + 1), np.uint32)
        flat, tokens = both.reshape(-1), self.corpus.tokens
        stretches = zip(places.tolist(), starts[begins].tolist(), counts.tolist(), strict=True)
        for at, start, count in stretches:
            flat[at : at + count] = tokens[start : start + count]
        inputs[:], targets[:] = both[:, :-1], both[:, 1:]
        filled = np.minimum(np.diff(ends[np.append(first, len(sizes))]), self.length)
        inside = columns <= self.length
        return row_of[inside], columns[inside], filled


class ConcatRows(PackedRows):
    """Rows of T = `length` tokens, cut from all documents one after another.

    Row r reads the T + 1 tokens from r * T on: the last one is the next row's first, so that every
    token but the corpus's last is an input once, and the row's last input has its target. The
    last row is filled up with padding.
    """

    def __len__(self) -> int:
        """ceil((N - 1) / T) for N tokens."""
        return math.ceil((len(self.corpus.tokens) - 1) / self.length)

    def _pieces(self, rows: NDArray[np.int64]) -> Pieces:
        offsets, starts = self.corpus.offsets, rows * self.length
        stops = np.minimum(starts + self.length + 1, len(self.corpus.tokens))
        first = np.searchsorted(offsets, starts, side="right") - 1
        row_of, documents = spread(first, np.searchsorted(offsets, stops) - first)
        begins = np.maximum(offsets[documents], starts[row_of])
        return Pieces(row_of, begins, np.minimum(offsets[documents + 1], stops[row_of]) - begins)


# No dataclass itself: the command line's parser would then take it for the only class allowed.
class Packing:
    """How documents become rows, as a spec of plain values; sub-classes are the packings."""

    def rows(self, corpus: Corpus, length: int, mask_documents: bool = True) -> PackedRows:
        """The rows of `length` tokens of a corpus, see `PackedRows`."""
        raise TypeError(f"{type(self).__name__} is no packing; choose a sub-class such as Concat")


@dataclass(frozen=True)
class Concat(Packing):
    """All documents one after another, cut every T tokens: no token is lost or padding, and
    documents are split wherever a row ends."""

    def rows(self, corpus: Corpus, length: int, mask_documents: bool = True) -> PackedRows:
        return ConcatRows(corpus, length, mask_documents)


def row_numbers(indices: Indices, size: int) -> NDArray[np.int64]:
    """Row numbers as an array. Raises an `IndexError` if one is not below `size`, or negative."""
    rows = np.asarray(indices, dtype=np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < size:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {size}")
    return rows


def spread(begins: NDArray[Any], counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which range each number is of, and begin, begin + 1, ... of one range after another."""
    range_of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(range_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return range_of, begins[range_of] + within


def length_percentiles(sizes: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    """Percentiles of documents' lengths in tokens, by "0", "10" to "100": `by_document` each
    document counts alike, `by_token` each token does."""
    ordered = np.sort(sizes)
    up_to = np.cumsum(ordered)
    percent = np.array(PERCENTILES)
    by_document = np.maximum(-(-percent * len(ordered) // 100), 1) - 1
    by_token = np.searchsorted(up_to, -(-percent * up_to[-1] // 100))
    return {
        key: dict(zip(map(str, PERCENTILES), ordered[at].tolist(), strict=True))
        for key, at in (("by_document", by_document), ("by_token", by_token))
    }


def _restart(
    documents: NDArray[np.int64],
    positions: NDArray[np.int64],
    rows: NDArray[Any],
    columns: NDArray[Any],
) -> None:
    """Begins a document at each of these places, in arrays of zeros and of steps (summed later)."""
    documents[rows, columns] = 1
    np.cumsum(documents, axis=1, out=documents)
    previous = np.zeros_like(columns)
    same_row = rows[1:] == rows[:-1]
    previous[1:][same_row] = columns[:-1][same_row]
    # A step that leads back to 0 from the last position of the document before.
    positions[rows, columns] = 1 - (columns - previous)
