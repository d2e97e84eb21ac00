"""Rows of whole documents: best-fit packing, and rows that are made of long documents."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.data.packing.concat import PackedRows, Packing, Pieces, spread
from ropepp.data.packing.packing_index import open_index
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError


@dataclass(frozen=True)
class BestFit(Packing):
    """Documents of at most T + 1 tokens stay whole, longer ones are cut into as few pieces as can
    be; best-fit-decreasing bin packing (arXiv 2404.10830) leaves little padding at rows' ends."""

    def rows(self, corpus: Corpus, length: int, mask_documents: bool = True) -> PackedRows:
        return BestFitRows(corpus, length, mask_documents)


@dataclass(frozen=True)
class Long(Packing):
    """Best-fit rows that each hold a long piece of one document; shorter documents only fill what
    is left of these rows, and are left out where there is no room.

    Args:
        share: Smallest length of the long piece as a share of the row, above 0 to 1.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"packing.share is {self.share}; allowed are above 0 to 1")

    def rows(self, corpus: Corpus, length: int, mask_documents: bool = True) -> PackedRows:
        return BestFitRows(corpus, length, mask_documents, math.ceil(self.share * length))


class BestFitRows(PackedRows):
    """Rows of T = `length` tokens, made of pieces that are whole documents where these fit.

    A document of more than T + 1 tokens gives rows that it fills alone, cut like `ConcatRows`, and
    a remainder. Remainders and shorter documents share rows, which end in padding where the pieces
    do not come out even. So each token of a document but its first is a target exactly once, and
    each but its last is an input exactly once; a document's last token, end-of-text, is an
    input too unless it ends a row's T + 1 tokens. A document of one token has no target and is left
    out.

    The packing is kept in the corpus's folder, see `ropepp.data.packing.packing_index`, also for
    `min_opening_tokens`. For `mask_documents` a piece counts as a document. Raises an `InputError`
    if `length` is below 1 or exceeds the corpus, or no piece opens a row."""

    def __init__(
        self, corpus: Corpus, length: int, mask_documents: bool = True, min_opening_tokens: int = 1
    ) -> None:
        super().__init__(corpus, length, mask_documents)
        self.min_opening_tokens = min_opening_tokens
        self.index = open_index(corpus, length, min_opening_tokens)
        self._alone = int(self.index.whole_rows[-1])
        if not len(self):
            raise InputError(
                f"{corpus.folder} has no document of at least {max(2, min_opening_tokens)} tokens"
                f" in its {corpus.meta.split} split, for rows of {length}"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the index itself: pickling would copy it.
        return type(self), (self.corpus, self.length, self.mask_documents, self.min_opening_tokens)

    def _pieces(self, rows: NDArray[np.int64]) -> Pieces:
        index, T, offsets = self.index, self.length, self.corpus.offsets
        counts, begin = np.ones_like(rows), np.zeros_like(rows)
        shared = np.flatnonzero(rows >= self._alone)
        numbers = rows[shared] - self._alone
        begin[shared] = index.packed_rows[numbers]
        counts[shared] = index.packed_rows[numbers + 1] - begin[shared]
        row_of, places = spread(begin, counts)

        remainder = rows[row_of] >= self._alone
        whole = rows[rows < self._alone]
        at = np.searchsorted(index.whole_rows, whole, side="right") - 1
        documents = np.empty_like(row_of)
        documents[remainder] = index.packed[places[remainder]]
        documents[~remainder] = index.whole[at]
        pieces, rest = np.divmod(offsets[documents + 1] - offsets[documents] - 1, T)
        pieces[~remainder] = whole - index.whole_rows[at]
        rest[~remainder] = T
        return Pieces(row_of, offsets[documents] + pieces * T, rest + 1)
