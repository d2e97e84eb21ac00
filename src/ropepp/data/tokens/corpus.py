"""A prepared corpus on disk: token ids, document offsets and what is known about them.

A corpus is a folder with the tokenizer's file (none for `bytes`) and

    SPLIT/meta.json                 `CorpusMeta`
    SPLIT/shards.json               a list of `ShardEntry`
    SPLIT/offsets.bin               int64, little-endian; documents + 1 numbers, the first 0, the
                                    last the number of tokens
    SPLIT/tokens.crc32              uint32, little-endian; the crc32 of each 64 KiB of the shards'
                                    tokens.bin, each begun anew
    shards/NAME/SPLIT/tokens.bin    ids, little-endian; uint16 when the vocabulary has at most
                                    65536 ids, otherwise uint32
    shards/NAME/SPLIT/offsets.bin, tokens.crc32    those of the shard alone

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
    CorpusMeta,
    ShardEntry,
    check_sha256,
    read_meta,
    read_shards,
    shard_folder,
)
from ropepp.data.tokens.reader import CHUNK, ShardedTokens, load_numbers
from ropepp.data.tokens.writer import (
    BLOCK,
    BLOCKS_FILE,
    CHECKSUM_TYPE,
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    token_type,
)
from ropepp.errors import InputError


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a prepared corpus; build it with `Corpus.open`. Document d is
    `tokens[offsets[d] : offsets[d + 1]]`."""

    folder: Path  # the corpus's
    tokens: NDArray[Any] | ShardedTokens  # (tokens,) uint16 or uint32; slices are arrays
    offsets: NDArray[np.int64]  # (documents + 1,) read-only
    meta: CorpusMeta  # counts, tokenizer, checksums

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "Corpus":
        """Opens a split, "train" or "validation", after comparing its files with their checksums:
        all but the shards' own, whose sizes are compared here and whose tokens as they are read
        (`verify` compares all). Raises an `InputError` if a file is missing, damaged, of another
        format, or contradicts `meta.json`."""
        folder = Path(folder)
        place = folder / split
        if not place.is_dir():
            raise InputError(
                f"{place} is no folder; `ropepp prepare` makes it (validation if its"
                " validation_fraction is above 0)"
            )
        meta = read_meta(place / META_FILE)
        for name, expected in meta.files_sha256.items():
            check_sha256(folder / name, expected)
        dtype = token_type(meta.vocab_size)
        path = place / OFFSETS_FILE
        offsets = load_numbers(path, OFFSET_TYPE, meta.documents + 1, meta.offsets_checksum)
        _check_offsets(path, offsets, meta.tokens)
        shards = read_shards(folder, meta)
        blocks = sum(-(-shard.tokens * dtype.itemsize // BLOCK) for shard in shards)
        checksums = load_numbers(place / BLOCKS_FILE, CHECKSUM_TYPE, blocks, meta.tokens_checksum)
        files = [
            (shard_folder(folder, shard.name, split) / TOKENS_FILE, shard.tokens)
            for shard in shards
        ]
        return cls(folder, ShardedTokens(files, dtype, meta.vocab_size, checksums), offsets, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: pickling an array would copy the corpus.
        return Corpus.open, (self.folder, self.meta.split)

    def verify(self) -> None:
        """Reads everything: checksums, and that every id is below the vocabulary's size. Raises an
        `InputError` if a file is not what was written."""
        Corpus.open(self.folder, self.meta.split)
        for entry in read_shards(self.folder, self.meta):
            place = shard_folder(self.folder, entry.name, self.meta.split)
            verify_shard(place, entry, token_type(self.meta.vocab_size), self.meta.vocab_size)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; an `InputError` if its file is missing or another."""
        tokenizer = load_tokenizer("bytes" if self.meta.tokenizer == "bytes" else self.folder)
        if tokenizer.fingerprint != self.meta.tokenizer_fingerprint:
            raise InputError(
                f"{self.folder} has a tokenizer with fingerprint {tokenizer.fingerprint};"
                f" {META_FILE} says {self.meta.tokenizer_fingerprint}"
            )
        return tokenizer


def verify_shard(place: Path, entry: ShardEntry, dtype: np.dtype[Any], vocab_size: int) -> None:
    """Reads the files of a shard's split and compares them with what is known of them. Raises an
    `InputError` if one is missing or not what was written."""
    load_numbers(place / OFFSETS_FILE, OFFSET_TYPE, entry.documents + 1, entry.offsets_checksum)
    check_sha256(place / BLOCKS_FILE, entry.tokens_checksum)
    checksums = np.fromfile(place / BLOCKS_FILE, CHECKSUM_TYPE)
    tokens = [(place / TOKENS_FILE, entry.tokens)]
    ShardedTokens(tokens, dtype, vocab_size, checksums).verify()


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
