"""Exact copies of documents, found by the hash of their text over all shards.

Two steps, so that shards can be read by many processes and the result is always the same: every
shard's hashes are written to a file, 16 bytes a document; then those of all shards are compared,
and of equal ones the first in the order of the shards stays. The costs: the input is read twice (a
few percent of what `tiktoken` takes, less with other tokenizers), 16 bytes of disk for each
document while it lasts, and at most about 0.5 GB of memory for any number of documents, for which
the hash files are read once for each `AT_A_TIME` documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropepp.data.prepare.encode import Report
from ropepp.data.text.documents import digest_and_size
from ropepp.data.text.readers import OnBadLine, Reader
from ropepp.data.text.skipped import Skipped
from ropepp.data.text.sources import Shard
from ropepp.files import disk_errors, replacing_file

HASHES_FOLDER = "hashes"
HASH_TYPE = np.dtype([("high", ">u8"), ("low", ">u8")])
AT_A_TIME = 1 << 22  # documents compared at a time
BUFFERED = 1 << 16  # hashes written at a time


@dataclass(frozen=True)
class HashJob:
    """All that a process needs to know."""

    folder: Path
    shard: Shard
    key: str
    on_bad_line: OnBadLine

    @property
    def label(self) -> str:
        return self.shard.label

    @property
    def path(self) -> Path:
        """The file of hashes; another one when the input or the way to read it is another."""
        facts = [(i.label, i.size, i.mtime_ns, i.rows) for i in self.shard.inputs]
        name = hashlib.sha256(repr((self.key, facts)).encode()).hexdigest()[:32]
        return self.folder / HASHES_FOLDER / name


def hash_shard(job: HashJob, report: Report) -> None:
    """Writes the hash of each document of a shard, in order.

    Raises:
        InputError: The input cannot be read, or the disk is full.
    """
    reader = Reader(job.key, job.on_bad_line, Skipped(), lambda count: report(count, 0, 0))
    hashes: list[bytes] = []
    with disk_errors(job.path), replacing_file(job.path) as file:
        for text in reader.texts(job.shard.inputs):
            hashes.append(digest_and_size(text)[0][: HASH_TYPE.itemsize])
            if len(hashes) >= BUFFERED:
                file.write(b"".join(hashes))
                report(0, len(hashes), 0)
                hashes = []
        file.write(b"".join(hashes))
    report(0, len(hashes), 0)


def find_duplicates(files: Sequence[Path], at_a_time: int = AT_A_TIME) -> list[NDArray[np.int64]]:
    """For each file of hashes the numbers of those that an earlier place has too, increasing.

    Args:
        files: In the order in which the first of equal ones stays.
        at_a_time: Hashes in memory at a time, about.
    """
    counts = [file.stat().st_size // HASH_TYPE.itemsize for file in files]
    ends = np.cumsum(counts, dtype=np.int64)
    rounds = max(1, ceil(sum(counts) / at_a_time))
    found = []
    for number in range(rounds):
        found.append(_copies(files, counts, number, rounds))
    copies = np.sort(np.concatenate(found))
    parts = np.split(copies, np.searchsorted(copies, ends[:-1]))
    return [part - (end - count) for part, end, count in zip(parts, ends, counts, strict=True)]


def _copies(
    files: Sequence[Path], counts: list[int], number: int, rounds: int
) -> NDArray[np.int64]:
    """Numbers over all files of the copies among the hashes with remainder `number`."""
    hashes, indices, begin = [], [], 0
    for file, count in zip(files, counts, strict=True):
        content = np.fromfile(file, HASH_TYPE)
        chosen = np.flatnonzero(content["low"] % rounds == number)
        hashes.append(content[chosen])
        indices.append(chosen + begin)
        begin += count
    together, index = np.concatenate(hashes), np.concatenate(indices)
    high, low = together["high"].astype(np.uint64), together["low"].astype(np.uint64)
    # Stable: of equal ones the first stays in front.
    order = np.lexsort((low, high))
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    return index[order[1:][same]]
