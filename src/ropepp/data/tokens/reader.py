"""Numbers on disk: reading what was written, and nothing else.

A corpus's small files are compared with their checksums whenever it is opened, its tokens block by
block when a process first reads any of a block: that costs no time at the start, however large a
corpus is, and nothing that is read differs from what was written.
"""

import os
import resource
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.checksums import crc32
from ropepp.data.tokens.writer import BLOCK, META_FILE, BlockChecksums
from ropepp.errors import InputError
from ropepp.files import read_errors

CHUNK = 1 << 22  # numbers looked at at a time
IN_MEMORY = 64 << 20  # bytes of a file of numbers up to which it is not mapped
# Token files that this process holds open: at the usual limit of 1024, which also counts sockets,
# pipes and logs, a quarter.
OPEN_FILES = max(8, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] % (1 << 63), 1 << 14) // 4)


class ShardedTokens:
    """Token files of many shards as one sequence to take slices of, plain arrays.

    Files are read, not mapped: one that was cut short, or a disk that fails, is then an error with
    a name instead of the end of the process, and only `OPEN_FILES` are open at a time.

    `parts` are the file and number of tokens of each shard, in order, none empty; `checksums` the
    crc32 of every block of every file, one file after another. Raises an `InputError` if a file is
    missing or of another size."""

    def __init__(
        self,
        parts: Sequence[tuple[Path, int]],
        dtype: np.dtype[Any],
        vocab_size: int,
        checksums: NDArray[np.uint32],
    ) -> None:
        self.dtype = dtype
        self._vocab_size = vocab_size
        self.checksums = checksums
        self._paths = [str(path) for path, _ in parts]
        self._keys = [check_size(path, dtype, count) for path, count in parts]
        self._stamps = list(self._keys)
        self._starts = [0, *accumulate(count for _, count in parts)]
        blocks = (-(-count * dtype.itemsize // BLOCK) for _, count in parts)
        self._blocks = [0, *accumulate(blocks)]
        self._unread = bytearray(b"\1") * self._blocks[-1]  # of each block, by this process

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: slice) -> NDArray[Any]:
        """(stop - start,) the tokens of a slice. Raises an `IndexError` if its step is not 1, an
        `InputError` if a file cannot be read or is not what was written."""
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"step is {step}; tokens are read one after another")
        stop = max(start, stop)
        parts = []
        for shard in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
            first, end = self._starts[shard], self._starts[shard + 1]
            parts.append(self._read(shard, max(start - first, 0), min(stop, end) - first))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def verify(self) -> None:
        """Reads everything; an `InputError` names a file that is not what was written."""
        self._unread = bytearray(b"\1") * self._blocks[-1]
        for start in range(0, len(self), CHUNK):
            self[start : start + CHUNK]

    def _read(self, shard: int, begin: int, end: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        begin, end = begin * size, end * size
        path = self._paths[shard]
        with read_errors(path):
            file = _opened(path, self._keys[shard])
        own = slice(self._blocks[shard], self._blocks[shard + 1])
        if file.stamp != self._stamps[shard]:
            # It was exchanged or touched since.
            self._stamps[shard] = file.stamp
            self._unread[own] = b"\1" * (own.stop - own.start)
        first, last = begin // BLOCK, -(-end // BLOCK)
        if self._unread.find(1, own.start + first, own.start + last) < 0:
            return np.frombuffer(file.read(begin, end), self.dtype)
        content = file.read(first * BLOCK, min(last * BLOCK, self._keys[shard][0]))
        self._compare(shard, first, content)
        self._unread[own.start + first : own.start + last] = bytes(last - first)
        return np.frombuffer(content, self.dtype, (end - begin) // size, begin - first * BLOCK)

    def _compare(self, shard: int, first: int, content: bytes) -> None:
        """Of the blocks from `first` on, whole ones."""
        view, at = memoryview(content), self._blocks[shard] + first
        for begin in range(0, len(content), BLOCK):
            if crc32(view[begin : begin + BLOCK]) != self.checksums[at + begin // BLOCK]:
                begin += first * BLOCK  # noqa: PLW2901
                raise InputError(
                    f"{self._paths[shard]} is damaged: bytes {begin} to {begin + BLOCK - 1} are not"
                    " what was written; `ropepp prepare` with --overwrite true makes it again"
                )
        ids = np.frombuffer(content, self.dtype)
        if ids.max() >= self._vocab_size:
            place = int(np.argmax(ids >= self._vocab_size))
            raise InputError(
                f"{self._paths[shard]} has the id {ids[place]} at token"
                f" {first * BLOCK // self.dtype.itemsize + place}; ids must be below vocab_size"
                f" {self._vocab_size}"
            )


class _OpenFile:
    """A file until nobody uses it any more; `stamp` is of the one that was found."""

    _handle = -1

    def __init__(self, path: str, key: tuple[int, ...]) -> None:
        del key  # tells apart what this process has seen in the same place
        self._path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.stamp = _stamp(os.fstat(self._handle))

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._handle)

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`."""
        with read_errors(self._path):
            content = os.pread(self._handle, end - begin, begin)
        if len(content) < end - begin:
            raise InputError(
                f"{self._path} was cut short since it was opened: it ends at byte"
                f" {begin + len(content)}, and {end} are needed"
            )
        return content


_opened = lru_cache(OPEN_FILES)(_OpenFile)


def load_numbers(path: Path, dtype: np.dtype[Any], count: int, checksum: str) -> NDArray[Any]:
    """(count,) the numbers of a file, read-only; memory-mapped if they are many. Raises an
    `InputError` if the file is missing, of another size, or not what was written."""
    check_size(path, dtype, count)
    with read_errors(path):
        large = count * dtype.itemsize > IN_MEMORY
        # A plain array over the map: slicing np.memmap itself is several times slower.
        numbers = np.asarray(np.memmap(path, dtype, "r")) if large else np.fromfile(path, dtype)
    if (found := BlockChecksums(numbers).digest()) != checksum:
        raise InputError(
            f"{path} is damaged: its checksum is {found[:12]}, and {checksum[:12]} was written"
        )
    numbers.flags.writeable = False
    return numbers


def check_size(path: Path, dtype: np.dtype[Any], count: int) -> tuple[int, ...]:
    """A file's size, time and number; an `InputError` unless it holds so many numbers."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(
            f"{path} is missing ({error.strerror}); a prepared corpus has it"
        ) from None
    expected = count * dtype.itemsize
    if status.st_size != expected:
        raise InputError(f"{path} has {status.st_size} bytes; {META_FILE} says {expected}")
    return _stamp(status)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino
