"""Best-fit packing of documents into rows, computed once for a corpus and kept beside it.

A document of L tokens is cut into pieces of T + 1 tokens that share their ends, as many as it
has room for, and a remainder of at most T tokens; that is (L - 1) // T pieces, which fill rows of
their own, and a remainder of (L - 1) % T targets. The remainders, most of them whole documents, are
put into rows of T + 1 tokens by best-fit-decreasing bin packing, as in "Fewer Truncations Improve
Language Modeling" (arXiv 2404.10830).
"""

import warnings
from bisect import bisect_left, insort
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.data.tokens.corpus import Corpus
from ropepp.data.tokens.reader import load_numbers
from ropepp.data.tokens.writer import BlockChecksums
from ropepp.errors import InputError
from ropepp.files import replacing_folder, write_synced
from ropepp.records import read_record, write_record

INDEX_VERSION = 3  # of the files and of what the algorithm makes: a new one makes old ones void
KEY_FILE = "key.json"
NUMBER: np.dtype[Any] = np.dtype("<u4")  # of a document or a row: four bytes of each document
NOWHERE = np.iinfo(NUMBER).max
ROW: np.dtype[Any] = np.dtype("<i8")
ARRAYS = {"whole": NUMBER, "whole_rows": ROW, "packed": NUMBER, "packed_rows": ROW}


@dataclass(frozen=True, eq=False)
class PackingIndex:
    """Which documents each row holds: first come rows of one piece, then those of remainders."""

    whole: NDArray[Any]  # (W,) documents with pieces that fill a row, ascending
    whole_rows: NDArray[np.int64]  # (W + 1,) each one's first row, then the number of rows
    packed: NDArray[Any]  # (R,) documents whose remainders are packed, row by row
    packed_rows: NDArray[np.int64]  # (rows + 1,) where each further row begins in `packed`

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.whole_rows[-1]) + len(self.packed_rows) - 1


@dataclass(frozen=True)
class IndexMeta:
    """The content of `KEY_FILE`: of what an index is and how it was made; and, unless it is the key
    alone, the lengths and checksums of its arrays."""

    version: int
    length: int
    min_opening_tokens: int
    documents: int
    offsets_checksum: str
    sizes: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


def open_index(corpus: Corpus, length: int, min_opening_tokens: int) -> PackingIndex:
    """The index from its folder in the split's folder, which is made if needed.

    It names the documents' offsets by their checksum: another corpus in the same place gets another
    index, and so does a damaged one. Where the folder cannot be written, the index is in memory
    alone. Processes that make it at the same time write the same, under names of their own first.

    A piece of fewer than `min_opening_tokens` opens no row: it goes where there is room, and is
    left out where there is none."""
    place = corpus.folder / corpus.meta.split
    path = place / f"best_fit_{length}_{min_opening_tokens}.index"
    documents, checksum = len(corpus.offsets) - 1, corpus.meta.offsets_checksum
    key = IndexMeta(INDEX_VERSION, length, min_opening_tokens, documents, checksum)
    found = _load(path, key)
    if found is None:
        built = build_index(corpus.offsets, length, min_opening_tokens)
        if place.is_dir() and _load(path, key) is None:  # no other process was faster
            _save(path, key, built)
        # From the files, processes on a machine share it.
        found = _load(path, key) or built
    return found


def build_index(
    offsets: NDArray[np.int64], length: int, min_opening_tokens: int = 1
) -> PackingIndex:
    """Packs documents, see the module and `open_index`; takes O(documents + T log T) operations
    after sorting, and about 40 bytes a document. Raises an `InputError` if there are too many
    documents to be numbered in four bytes."""
    if len(offsets) - 1 >= NOWHERE:
        raise InputError(f"the corpus has {len(offsets) - 1} documents; fewer than {NOWHERE} fit")
    pieces, rest = np.divmod(np.diff(offsets) - 1, length)
    # Sixteen bits are sorted several times faster.
    remainders = np.where(rest, rest + 1, 0).astype(np.uint16 if length < 1 << 16 else np.uint32)
    bins = best_fit_decreasing(remainders, length + 1, min_opening_tokens)
    order = np.argsort(bins, kind="stable").astype(NUMBER)
    counts = np.bincount(bins[bins != NOWHERE])
    packed_rows = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    whole = np.flatnonzero(pieces).astype(NUMBER)
    whole_rows = np.concatenate(([0], np.cumsum(pieces[whole]))).astype(np.int64)
    return PackingIndex(whole, whole_rows, order[: packed_rows[-1]], packed_rows)


def best_fit_decreasing(
    sizes: NDArray[Any], capacity: int, min_opening: int = 1
) -> NDArray[np.unsignedinteger[Any]]:
    """Puts items of (n,) sizes, 0 to `capacity`, into bins of that size: the largest first, each
    where the least room is left that suffices. Returns (n,) the number of each item's bin, or
    `NOWHERE` for an item of size 0, and for one below `min_opening`, which begins no bin, where
    there is no room.

    Items of one size are placed together: a bin that was the best for one of them is the best for
    the next too until it has no room for it, and bins with equal room are filled alike. So there
    are O(capacity) steps, each on whole arrays."""
    bins = np.full(len(sizes), NOWHERE, NUMBER)
    order = np.argsort(sizes, kind="stable").astype(NUMBER)
    counts = np.bincount(sizes, minlength=capacity + 1)
    ends = np.cumsum(counts)
    rooms, begun = _Rooms(), 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        if size == 0:
            break
        items = order[ends[size] - counts[size] : ends[size]]
        while len(items):
            room = rooms.smallest(size)
            each = (room or capacity) // size
            wanted = -(-len(items) // each)
            if room is not None:
                found = rooms.take(room, wanted)
            elif size >= min_opening:
                room, found = capacity, np.arange(begun, begun + wanted, dtype=NUMBER)
                begun += wanted
            else:
                break
            here, items = items[: each * len(found)], items[each * len(found) :]
            bins[here] = np.repeat(found, each)[: len(here)]
            in_last = len(here) - each * (len(found) - 1)
            rooms.add(room - each * size, found[:-1])
            rooms.add(room - in_last * size, found[-1:])
    return bins


class _Rooms:
    """Bins by the room that is left in them."""

    def __init__(self) -> None:
        self._bins: dict[int, list[NDArray[Any]]] = {}
        self._sorted: list[int] = []

    def smallest(self, size: int) -> int | None:
        """The smallest room of at least `size`, if there is any."""
        at = bisect_left(self._sorted, size)
        return self._sorted[at] if at < len(self._sorted) else None

    def add(self, room: int, bins: NDArray[Any]) -> None:
        if not room or not len(bins):
            return
        if room not in self._bins:
            self._bins[room] = []
            insort(self._sorted, room)
        self._bins[room].append(bins)

    def take(self, room: int, wanted: int) -> NDArray[Any]:
        """Removes as many of the bins with this room, or all; the rest is not copied."""
        stack, taken = self._bins[room], []
        while stack and wanted:
            part = stack.pop()
            if len(part) > wanted:
                stack.append(part[wanted:])
                part = part[:wanted]
            taken.append(part)
            wanted -= len(part)
        if not stack:
            del self._bins[room]
            self._sorted.pop(bisect_left(self._sorted, room))
        return np.concatenate(taken)


def _save(folder: Path, key: IndexMeta, index: PackingIndex) -> None:
    """Writes the arrays and what is known of them, completely or not at all."""
    arrays = {name: getattr(index, name).astype(kind) for name, kind in ARRAYS.items()}
    # The folder may be read-only, or another process may have been faster.
    with suppress(OSError, InputError), replacing_folder(folder, overwrite=True) as work:
        for name, array in arrays.items():
            write_synced(work / f"{name}.bin", array.data)
        meta = replace(
            key,
            sizes={name: len(array) for name, array in arrays.items()},
            checksums={name: BlockChecksums(array).digest() for name, array in arrays.items()},
        )
        write_record(work / KEY_FILE, meta)


def _load(folder: Path, key: IndexMeta) -> PackingIndex | None:
    """An index; None where there is none of this key, or where it is damaged."""
    if not (folder / KEY_FILE).is_file():
        return None
    try:
        meta = read_record(folder / KEY_FILE, IndexMeta)
        if replace(meta, sizes={}, checksums={}) != key:
            return None
        return PackingIndex(
            *(
                load_numbers(folder / f"{name}.bin", kind, meta.sizes[name], meta.checksums[name])
                for name, kind in ARRAYS.items()
            )
        )
    except (InputError, KeyError) as error:
        warnings.warn(f"{error}; the index is made anew", stacklevel=2)
        return None
