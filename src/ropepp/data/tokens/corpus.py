"""A prepared corpus on disk: token ids, document offsets and what is known about them.

A corpus is a folder with the tokenizer's file (none for `bytes`) and

    SPLIT/meta.json                 `CorpusMeta`
    SPLIT/shards.json               a list of `ShardEntry`
    SPLIT/offsets.bin               int64, little-endian; documents + 1 numbers, the first 0, the
                                    last the number of tokens
    shards/NAME/SPLIT/tokens.bin    ids, little-endian; uint16 when the vocabulary has at most
                                    65536 ids, otherwise uint32
    shards/NAME/SPLIT/offsets.bin   those of the shard alone

The ids of a split are those of its shards one after another. Every document is stored as [BOS if
the tokenizer has one] + ids + [end-of-text].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.data.tokenizer import Tokenizer, load_tokenizer
from ropepp.data.tokens.meta import (
    SHARDS_FILE,
    CorpusMeta,
    read_meta,
    read_shards,
    shard_folder,
)
from ropepp.data.tokens.writer import (
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    ShardedTokens,
    check_size,
    map_numbers,
    token_type,
)
from ropepp.errors import InputError
from ropepp.files import file_sha256

CHUNK = 1 << 22  # numbers looked at at a time


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a prepared corpus, memory-mapped; build it with `Corpus.open`.

    Attributes:
        folder: The corpus's folder.
        tokens: (tokens,) uint16 or uint32, read-only; has a length and gives arrays for slices.
        offsets: (documents + 1,) int64, read-only; document d is `tokens[offsets[d] : offsets[d +
            1]]`.
        meta: Counts, tokenizer, checksums.
    """

    folder: Path
    tokens: NDArray[Any] | ShardedTokens
    offsets: NDArray[np.int64]
    meta: CorpusMeta

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "Corpus":
        """Maps a split after checking that its files fit each other (not their checksums:
        `verify`).

        Args:
            folder: The corpus's folder.
            split: "train" or "validation".

        Raises:
            InputError: A file is missing, cut off, of another format, or contradicts `meta.json`.
        """
        folder = Path(folder)
        place = folder / split
        if not place.is_dir():
            raise InputError(
                f"{place} is no folder; `ropepp prepare` makes it (validation if its"
                " validation_fraction is above 0)"
            )
        meta = read_meta(place / META_FILE)
        dtype = token_type(meta.vocab_size)
        offsets = map_numbers(place / OFFSETS_FILE, OFFSET_TYPE, meta.documents + 1)
        _check_offsets(place / OFFSETS_FILE, offsets, meta.tokens)
        files = [
            (shard_folder(folder, shard.name, split) / TOKENS_FILE, shard.tokens)
            for shard in read_shards(folder, meta)
        ]
        for path, count in files:
            check_size(path, dtype, count)
        # One shard alone is read as what it is, a plain array.
        (path, count), *others = files
        tokens = ShardedTokens(files, dtype) if others else map_numbers(path, dtype, count)
        return cls(folder, tokens, offsets, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: pickling an array would copy the corpus.
        return Corpus.open, (self.folder, self.meta.split)

    def verify(self) -> None:
        """Reads everything: checksums, and that every id is below the vocabulary's size.

        Raises:
            InputError: A file is not what was written.
        """
        place, meta = self.folder / self.meta.split, self.meta
        files = [
            (place / SHARDS_FILE, meta.shards_sha256),
            (place / OFFSETS_FILE, meta.offsets_sha256),
        ]
        for entry in read_shards(self.folder, meta):
            shard = shard_folder(self.folder, entry.name, meta.split)
            files += [
                (shard / TOKENS_FILE, entry.tokens_sha256),
                (shard / OFFSETS_FILE, entry.offsets_sha256),
            ]
        for path, expected in files:
            _check_sha256(path, expected)
        for start in range(0, len(self.tokens), CHUNK):
            largest = int(self.tokens[start : start + CHUNK].max())
            if largest >= meta.vocab_size:
                raise InputError(
                    f"{place} has the id {largest}; ids must be below vocab_size {meta.vocab_size}"
                )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            InputError: The corpus's tokenizer file is missing or was exchanged.
        """
        tokenizer = load_tokenizer("bytes" if self.meta.tokenizer == "bytes" else self.folder)
        if tokenizer.fingerprint != self.meta.tokenizer_fingerprint:
            raise InputError(
                f"{self.folder} has a tokenizer with fingerprint {tokenizer.fingerprint};"
                f" {META_FILE} says {self.meta.tokenizer_fingerprint}"
            )
        return tokenizer


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if (found := file_sha256(path)) != expected:
        raise InputError(f"{path} has sha256 {found}; {META_FILE} says {expected}")


def _check_offsets(path: Path, offsets: NDArray[np.int64], tokens: int) -> None:
    ends = int(offsets[0]), int(offsets[-1])
    if ends != (0, tokens):
        raise InputError(f"{path} runs from {ends[0]} to {ends[1]}; expected 0 to {tokens}")
    for start in range(0, len(offsets) - 1, CHUNK):
        falls = np.flatnonzero(np.diff(offsets[start : start + CHUNK + 1]) <= 0)
        if len(falls):
            at = start + int(falls[0])
            raise InputError(
                f"{path} has {offsets[at]} then {offsets[at + 1]} at document {at};"
                " offsets must increase"
            )
