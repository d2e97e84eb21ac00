"""Numbers on disk: writing the documents of a split, and reading many files as one sequence."""

import hashlib
import os
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.files import disk_errors

TOKENS_FILE, OFFSETS_FILE, META_FILE = "tokens.bin", "offsets.bin", "meta.json"
TOKEN_TYPES: tuple[np.dtype[Any], ...] = np.dtype("<u2"), np.dtype("<u4")
OFFSET_TYPE: np.dtype[Any] = np.dtype("<i8")
BUFFER = 1 << 20  # numbers buffered at a time
# The kernel allows 65530 maps to a process; shards beyond this many are mapped anew in turns.
MAX_MAPS = 16384


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest of `TOKEN_TYPES` that holds every id of the vocabulary.

    Raises:
        InputError: None does.
    """
    for dtype in TOKEN_TYPES:
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise InputError(f"the tokenizer has vocab_size {vocab_size}; allowed are up to {2**32}")


class TokenWriter:
    """Writes documents to the token file and the offsets of a folder, in bounded memory; a context
    manager. The files are complete after `sync`.

    Args:
        place: Existing folder.
        tokenizer: What made the ids.
    """

    def __init__(self, place: Path, tokenizer: Tokenizer) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._end = [tokenizer.eot_id]
        self._tokens = _NumberFile(
            place / TOKENS_FILE, token_type(tokenizer.vocab_size), tokenizer.vocab_size
        )
        self._offsets = _NumberFile(place / OFFSETS_FILE, OFFSET_TYPE)
        self._offsets.append([0])

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._tokens.close()
        self._offsets.close()

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends a document: its ids without BOS and end-of-text, and its text's UTF-8 bytes.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        self.begin()
        self.extend(ids)
        self.finish(text_bytes)

    def begin(self) -> None:
        """Begins a document that comes in pieces: then any number of `extend`, then `finish`."""
        self.extend(self._start)

    def extend(self, ids: Sequence[int]) -> None:
        self._tokens.append(ids if isinstance(ids, list) else list(ids))
        self.tokens += len(ids)

    def finish(self, text_bytes: int) -> None:
        self.extend(self._end)
        self.documents += 1
        self.text_bytes += text_bytes
        self._offsets.append([self.tokens])

    def sync(self) -> None:
        """Puts everything on the disk."""
        self._tokens.sync()
        self._offsets.sync()

    def counts_and_checksums(self) -> dict[str, Any]:
        """Counts and checksums; after `sync`."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "tokens_sha256": self._tokens.sha256,
            "offsets_sha256": self._offsets.sha256,
        }


class _NumberFile:
    """A file of numbers, written through a buffer, that knows its checksum."""

    def __init__(self, path: Path, dtype: np.dtype[Any], below: int | None = None) -> None:
        self._path, self._below = path, below
        with disk_errors(path):
            self._file = path.open("wb", buffering=0)
        self._buffer = array(dtype.char)
        self._digest = hashlib.sha256()

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, numbers: list[int]) -> None:
        try:
            self._buffer.fromlist(numbers)
        except OverflowError:
            limit = 256**self._buffer.itemsize
            raise self._refuse(next(n for n in numbers if not 0 <= n < limit)) from None
        if len(self._buffer) >= BUFFER:
            self._flush()

    def sync(self) -> None:
        self._flush()
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def _flush(self) -> None:
        if self._below is not None and len(self._buffer):
            largest = int(np.frombuffer(self._buffer, self._buffer.typecode).max())
            if largest >= self._below:
                raise self._refuse(largest)
        if sys.byteorder == "big":
            self._buffer.byteswap()
        rest = memoryview(self._buffer).cast("B")
        self._digest.update(rest)
        with disk_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._buffer = array(self._buffer.typecode)

    def _refuse(self, number: int) -> InputError:
        return InputError(
            f"{self._path}: the tokenizer gave the id {number}; ids must be from 0 to below"
            f" {self._below}, its vocab_size ({8 * self._buffer.itemsize} bits in the file)"
        )


class ShardedTokens:
    """Token files of many shards as one sequence to take slices of; mapped when first read.

    Slices are plain arrays: a view where they lie in one shard, otherwise a copy.

    Args:
        parts: File and number of tokens of each shard, in order; none may be empty.
        dtype: Type of the numbers.

    Attributes:
        dtype: Type of the numbers.
    """

    def __init__(self, parts: Sequence[tuple[Path, int]], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._paths = [path for path, _ in parts]
        self._starts = [0, *accumulate(count for _, count in parts)]
        self._map = lru_cache(MAX_MAPS)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: pickling an array would copy it.
        counts = [end - start for start, end in pairwise(self._starts)]
        return ShardedTokens, (list(zip(self._paths, counts, strict=True)), self.dtype)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """(stop - start,) the tokens of a slice.

        Raises:
            IndexError: The slice's step is not 1.
        """
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"step is {step}; tokens are read one after another")
        stop = max(start, stop)
        shards = range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop))
        parts = [
            self._map(shard)[max(start - self._starts[shard], 0) : stop - self._starts[shard]]
            for shard in shards
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _open(self, shard: int) -> NDArray[Any]:
        count = self._starts[shard + 1] - self._starts[shard]
        return map_numbers(self._paths[shard], self.dtype, count)


def map_numbers(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """(count,) the numbers of a file, memory-mapped and read-only.

    Raises:
        InputError: The file is missing or of another size.
    """
    check_size(path, dtype, count)
    # A plain array over the map: slicing np.memmap itself is several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def check_size(path: Path, dtype: np.dtype[Any], count: int) -> None:
    """Raises an `InputError` if a file of numbers is missing or has another number of them."""
    if not path.is_file():
        raise InputError(f"{path} is missing; a prepared corpus has it in every split")
    found, expected = path.stat().st_size, count * dtype.itemsize
    if found != expected:
        raise InputError(f"{path} has {found} bytes; {META_FILE} says {expected}")
