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

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp import __version__
from ropepp.data.text.readers import Skipped
from ropepp.data.tokenizer import Tokenizer, load_tokenizer
from ropepp.data.tokens.reader import CHUNK, ShardedTokens, check_size, load_numbers
from ropepp.data.tokens.writer import (
    BLOCK,
    BLOCKS_FILE,
    CHECKSUM_TYPE,
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    BlockChecksums,
    token_type,
)
from ropepp.errors import InputError
from ropepp.files import disk_errors, file_sha256, read_errors, remove, sync_folder, write_synced
from ropepp.records import as_record, read_json, read_record, write_record

FORMAT_VERSION = 4
SHARDS_FOLDER, SHARDS_FILE = "shards", "shards.json"
NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # of a shard or a file: no way to another place


@dataclass(frozen=True)
class CorpusMeta:
    """The content of `meta.json`."""

    format_version: int
    ropepp_version: str
    name: str
    split: str
    source: str
    documents: int  # of this split alone, as the next two
    tokens: int  # with BOS and end-of-text
    text_bytes: int  # of the documents in UTF-8
    bad_lines: int  # left out of the whole corpus, as the next two
    empty_documents: int
    short_documents: int
    vocab_size: int
    tokenizer: str
    tokenizer_fingerprint: str
    bos_id: int | None
    eot_id: int
    shards: int  # of this split
    shards_sha256: str  # of their list, which has their own checksums
    files_sha256: dict[str, str]  # of the files beside the splits by their names
    tokens_checksum: str  # `BlockChecksums.digest` of the checksums of all tokens
    offsets_checksum: str  # the same of the offsets


@dataclass(frozen=True)
class ShardEntry:
    """A shard's documents of one split; `offsets` of its own begin at 0."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    tokens_checksum: str
    offsets_checksum: str


def shard_folder(folder: Path, name: str, split: str) -> Path:
    """Where a shard's files of a split lie."""
    return folder / SHARDS_FOLDER / name / split


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
    check_size(place / BLOCKS_FILE, CHECKSUM_TYPE, -(-entry.tokens * dtype.itemsize // BLOCK))
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


def join_shards(
    folder: Path,
    split: str,
    shards: Sequence[ShardEntry],
    tokenizer: Tokenizer,
    name: str,
    source: str = "",
    skipped: Skipped = Skipped(),  # noqa: B008 (read alone)
) -> CorpusMeta:
    """Makes a split of a corpus of these shards, in this order, without those that have no tokens;
    their files lie in the folder already and are not copied. A folder of the split's name is
    replaced. The tokenizer's facts go into `meta.json`, its file is not written; `skipped` is of
    the whole corpus. Raises a `DiskError` if a file could not be written."""
    place = folder / split
    with disk_errors(place):
        remove(place)
        place.mkdir()
    beside = sorted(path for path in folder.iterdir() if path.is_file())
    kept = [shard for shard in shards if shard.tokens]
    # One shard a line: long lists can be read and compared.
    lines = ",\n".join(json.dumps(asdict(shard)) for shard in kept)
    listing = f"[\n{lines}\n]\n".encode()
    write_synced(place / SHARDS_FILE, listing)
    own = [shard_folder(folder, shard.name, split) / BLOCKS_FILE for shard in kept]
    checksums = b"".join(path.read_bytes() for path in own)
    write_synced(place / BLOCKS_FILE, checksums)
    meta = CorpusMeta(
        format_version=FORMAT_VERSION,
        ropepp_version=__version__,
        name=name,
        split=split,
        source=source,
        documents=sum(shard.documents for shard in kept),
        tokens=sum(shard.tokens for shard in kept),
        text_bytes=sum(shard.text_bytes for shard in kept),
        bad_lines=skipped.bad_lines,
        empty_documents=skipped.empty_documents,
        short_documents=skipped.short_documents,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eot_id=tokenizer.eot_id,
        shards=len(kept),
        shards_sha256=hashlib.sha256(listing).hexdigest(),
        files_sha256={path.name: file_sha256(path) for path in beside},
        tokens_checksum=BlockChecksums(checksums).digest(),
        offsets_checksum=_join_offsets(folder, split, kept),
    )
    write_record(place / META_FILE, meta)
    if len(kept) == 1:  # its file has the split's ids alone and whole, as other programs read them
        with suppress(OSError):  # not every file system has links
            only = shard_folder(Path(".."), kept[0].name, split)
            (place / TOKENS_FILE).symlink_to(only / TOKENS_FILE)
    sync_folder(place)
    return meta


def read_shards(folder: Path, meta: CorpusMeta) -> list[ShardEntry]:
    """The shards of a split in order. Raises an `InputError` if their list is missing, is not what
    was written, or contradicts the meta."""
    path = folder / meta.split / SHARDS_FILE
    check_sha256(path, meta.shards_sha256)
    values = read_json(path)
    values = values if isinstance(values, list) else []
    shards = [as_record(each, ShardEntry, str(path)) for each in values]
    for shard in shards:
        if not NAME.fullmatch(shard.name) or not shard.tokens >= shard.documents >= 1:
            raise InputError(
                f"{path} has a shard {asdict(shard)}, which `ropepp prepare` makes not"
            )
    documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
    if (len(shards), documents, tokens) != (meta.shards, meta.documents, meta.tokens):
        raise InputError(
            f"{path} has {len(shards)} shards, {documents} documents and {tokens} tokens;"
            f" {META_FILE} says {meta.shards}, {meta.documents} and {meta.tokens}"
        )
    return shards


def read_meta(path: Path) -> CorpusMeta:
    """A split's `meta.json`; an `InputError` if it is missing, damaged, or not as described."""
    meta = read_record(path, CorpusMeta, FORMAT_VERSION)
    token_type(meta.vocab_size)
    if meta.split != path.parent.name or max(meta.bos_id or 0, meta.eot_id) >= meta.vocab_size:
        raise InputError(
            f"{path}: split is {meta.split!r}, bos_id {meta.bos_id}, eot_id {meta.eot_id}; allowed"
            f" are {path.parent.name!r} and ids below vocab_size {meta.vocab_size}"
        )
    if meta.documents < 1:
        raise InputError(f"{path}: documents is {meta.documents}; at least 1 is needed")
    for name in meta.files_sha256:
        if not NAME.fullmatch(name):
            raise InputError(f"{path}: files_sha256 names {name!r}; allowed are files beside it")
    return meta


def check_sha256(path: Path, expected: str) -> None:
    """Raises an `InputError` if a file is missing or not what was written."""
    if not path.is_file():
        raise InputError(f"{path} is missing; a prepared corpus has it")
    with read_errors(path):
        found = file_sha256(path)
    if found != expected:
        raise InputError(f"{path} is damaged: it has sha256 {found}; {META_FILE} says {expected}")


def _join_offsets(folder: Path, split: str, shards: Sequence[ShardEntry]) -> str:
    """Writes the starts of all documents and returns the file's checksum."""
    path, begin, checksums = folder / split / OFFSETS_FILE, 0, BlockChecksums()
    with disk_errors(path), path.open("wb") as file:
        for shard in shards:
            own = shard_folder(folder, shard.name, split) / OFFSETS_FILE
            offsets = np.fromfile(own, OFFSET_TYPE)
            # The end of one shard is the start of the next.
            content = (offsets[0 if begin == 0 else 1 :] + begin).astype(OFFSET_TYPE).tobytes()
            file.write(content)
            checksums.update(content)
            begin += shard.tokens
        file.flush()
        os.fsync(file.fileno())
    return checksums.digest()
