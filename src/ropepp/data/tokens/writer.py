"""Numbers on disk: writing the documents of a split, with checksums of all that is written."""

import hashlib
import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ropepp.checksums import crc32
from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.files import disk_errors, write_synced

TOKENS_FILE, OFFSETS_FILE, META_FILE = "tokens.bin", "offsets.bin", "meta.json"
BLOCKS_FILE = "tokens.crc32"
TOKEN_TYPES: tuple[np.dtype[Any], ...] = np.dtype("<u2"), np.dtype("<u4")
OFFSET_TYPE: np.dtype[Any] = np.dtype("<i8")
CHECKSUM_TYPE: np.dtype[Any] = np.dtype("<u4")
BLOCK = 1 << 16  # bytes of a token file that have a checksum of their own
BUFFER = 1 << 20  # numbers buffered at a time


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest of `TOKEN_TYPES` that holds every id; an `InputError` if none does."""
    for dtype in TOKEN_TYPES:
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise InputError(f"the tokenizer has vocab_size {vocab_size}; allowed are up to {2**32}")


class TokenWriter:
    """Writes documents to the token file and the offsets of an existing folder, in bounded memory;
    a context manager. These and the checksums of blocks of tokens are complete after `sync`."""

    def __init__(self, place: Path, tokenizer: Tokenizer) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._end = [tokenizer.eot_id]
        self._tokens = _NumberFile(
            place / TOKENS_FILE, token_type(tokenizer.vocab_size), tokenizer.vocab_size
        )
        self._offsets = _NumberFile(place / OFFSETS_FILE, OFFSET_TYPE)
        self._offsets.append([0])
        self._blocks = place / BLOCKS_FILE

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._tokens.close()
        self._offsets.close()

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends a document: its ids without BOS and end-of-text, and its text's UTF-8 bytes.
        Raises an `InputError` if an id is not in the vocabulary."""
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
        write_synced(self._blocks, self._tokens.checksums.content())

    def counts_and_checksums(self) -> dict[str, Any]:
        """Counts and checksums; after `sync`."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "tokens_checksum": self._tokens.checksums.digest(),
            "offsets_checksum": self._offsets.checksums.digest(),
        }


class BlockChecksums:
    """The crc32 of every `BLOCK` bytes of a file, from its first byte on."""

    def __init__(self, content: Any = b"") -> None:
        self._done = array("I")
        self._last = self._bytes = 0  # of the block that is not full
        self.update(content)

    def update(self, content: Any) -> None:
        """Goes on with these bytes, of anything that has a buffer."""
        view = memoryview(content)
        rest = view.cast("B") if view.nbytes else b""
        while rest:
            part = rest[: BLOCK - self._bytes]
            self._last = crc32(part, self._last)
            self._bytes += len(part)
            rest = rest[len(part) :]
            if self._bytes == BLOCK:
                self._done.append(self._last)
                self._last = self._bytes = 0

    def content(self) -> bytes:
        """One number for each block, the last one's included, in `CHECKSUM_TYPE`."""
        last = [self._last] if self._bytes else []
        return np.array([*self._done, *last], CHECKSUM_TYPE).tobytes()

    def digest(self) -> str:
        """sha256 of them, hexadecimal: a checksum of the file as fast as crc32."""
        return hashlib.sha256(self.content()).hexdigest()


class _NumberFile:
    """A file of numbers, written through a buffer, that knows its checksums."""

    def __init__(self, path: Path, dtype: np.dtype[Any], below: int | None = None) -> None:
        self._path, self._below = path, below
        with disk_errors(path):
            self._file = path.open("wb", buffering=0)
        self._buffer = array(dtype.char)
        self.checksums = BlockChecksums()

    def close(self) -> None:
        self._file.close()

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
        self.checksums.update(rest)
        with disk_errors(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._buffer = array(self._buffer.typecode)

    def _refuse(self, number: int) -> InputError:
        return InputError(
            f"{self._path}: the tokenizer gave the id {number}; ids must be from 0 to below"
            f" {self._below}, its vocab_size ({8 * self._buffer.itemsize} bits in the file)"
        )
