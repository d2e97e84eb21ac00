"""Token files to rows of equal length, without losing or repeating a token."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropepp.data.corpus import Corpus
from ropepp.errors import InputError

IGNORE_INDEX = -100
PADDING_DOCUMENT = -1
KEYS = ("input_ids", "targets", "document_ids", "positions")


class ConcatRows:
    """Rows of T = `length` tokens, cut from all documents one after another.

    Row r reads the T + 1 tokens from r * T on: the last one is the next row's first, so that every
    token but the corpus's last is an input once, and the row's last input has its target. The
    first token of a document is no target. The last row is filled up with padding.

    Args:
        corpus: What to read.
        length: Row length T in tokens.
        mask_documents: Number documents and positions inside a row; otherwise the row counts as
            one document, and attention may cross documents. The targets are the same.

    Raises:
        InputError: `length` is below 1 or exceeds the corpus.
    """

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

    def __len__(self) -> int:
        """ceil((N - 1) / T) for N tokens."""
        return math.ceil((len(self.corpus.tokens) - 1) / self.length)

    def batch(self, indices: NDArray[np.int64] | Sequence[int]) -> dict[str, Tensor]:
        """The rows of these numbers.

        Args:
            indices: (B,) row numbers.

        Returns:
            int64 tensors (B, T): `input_ids`, padding is 0; `targets`, the next token, or -100
            where that begins another document or does not exist; `document_ids`, 0, 1, ... inside
            the row, padding is -1; `positions`, from 0 in every document and row, padding is 0.

        Raises:
            IndexError: There is no such row.
        """
        starts = self._starts(indices)
        # One allocation: four of this size cost up to three times as much in page faults.
        arrays = np.empty((len(KEYS), len(starts), self.length), np.int64)
        inputs, targets, documents, positions = arrays
        for row, start in enumerate(starts.tolist()):
            self._copy_tokens(start, inputs[row])
            self._copy_tokens(start + 1, targets[row])
        rows, columns = self._boundaries(starts)
        targets[rows, columns - 1] = IGNORE_INDEX
        documents[:] = 0
        positions[:] = 1
        positions[:, 0] = 0
        if self.mask_documents:
            inside = columns < self.length
            _restart(documents, positions, rows[inside], columns[inside])
        np.cumsum(positions, axis=1, out=positions)
        filled = self._filled(starts)
        for row in np.flatnonzero(filled < self.length).tolist():
            padding = slice(filled[row], None)
            targets[row, padding] = IGNORE_INDEX
            documents[row, padding] = PADDING_DOCUMENT
            positions[row, padding] = 0
        return {key: torch.from_numpy(array) for key, array in zip(KEYS, arrays, strict=True)}

    def num_targets(self, indices: NDArray[np.int64] | Sequence[int]) -> int:
        """Number of targets other than -100 in the rows, from the document offsets alone.

        Raises:
            IndexError: There is no such row.
        """
        starts = self._starts(indices)
        first, last = self._span(starts)
        return int((self._filled(starts) - (last - first)).sum())

    def _starts(self, indices: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        return rows * self.length

    def _filled(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of inputs of each row that are no padding."""
        return np.minimum(self.length, len(self.corpus.tokens) - starts)

    def _span(self, starts: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Range of the entries of `offsets` after a row's first token, up to T tokens after it.

        The corpus's end counts: like a document's start, it is no target for the token before.
        """
        offsets = self.corpus.offsets
        first = np.searchsorted(offsets, starts, side="right")
        last = np.searchsorted(offsets, starts + self.length, side="right")
        return first, last

    def _boundaries(self, starts: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Row and column (1 to T) of the entries of `_span`, one row after another."""
        first, last = self._span(starts)
        counts = last - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.corpus.offsets[first[rows] + within] - starts[rows]

    def _copy_tokens(self, start: int, row: NDArray[np.int64]) -> None:
        tokens = self.corpus.tokens[start : start + self.length]
        row[: len(tokens)] = tokens
        row[len(tokens) :] = 0


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
