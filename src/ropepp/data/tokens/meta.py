"""What makes shards a corpus: the JSON files that say what is known, and all documents' offsets."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ropepp import __version__
from ropepp.data.text.readers import Skipped
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.writer import (
    BLOCKS_FILE,
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKENS_FILE,
    BlockChecksums,
    token_type,
)
from ropepp.errors import InputError
from ropepp.files import disk_errors, file_sha256, read_errors, sync_folder, write_synced
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
        shutil.rmtree(place, ignore_errors=True)
        place.unlink(missing_ok=True)
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
    """The content of a split's `meta.json`. Raises an `InputError` if it is missing, damaged, of
    another format, or not as described."""
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
