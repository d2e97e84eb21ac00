"""What makes shards a corpus: the JSON files that say what is known, and all documents' offsets."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np

from ropepp import __version__
from ropepp.data.text.readers import Skipped
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.writer import META_FILE, OFFSET_TYPE, OFFSETS_FILE
from ropepp.errors import InputError
from ropepp.files import disk_errors, sync_folder, write_synced

FORMAT_VERSION = 3
SHARDS_FOLDER, SHARDS_FILE = "shards", "shards.json"


@dataclass(frozen=True)
class CorpusMeta:
    """The content of `meta.json`; `documents`, `tokens` and `text_bytes` count this split alone.

    `tokens` counts BOS and end-of-text, `text_bytes` the UTF-8 bytes of the documents. `bad_lines`,
    `empty_documents` and `short_documents` were left out of the whole corpus. `shards` is the
    number of the split's shards; `shards_sha256` is of the list that has their own checksums.
    """

    format_version: int
    ropepp_version: str
    name: str
    split: str
    source: str
    documents: int
    tokens: int
    text_bytes: int
    bad_lines: int
    empty_documents: int
    short_documents: int
    vocab_size: int
    tokenizer: str
    tokenizer_fingerprint: str
    bos_id: int | None
    eot_id: int
    shards: int
    shards_sha256: str
    offsets_sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """A shard's documents of one split; `offsets` of its own begin at 0."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    tokens_sha256: str
    offsets_sha256: str


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
    """Makes a split of a corpus of these shards, in this order; tokens are not copied.

    Args:
        folder: The corpus's folder, where the shards' files lie already.
        split: Name of the split; a folder of that name is replaced.
        shards: What was written; those without tokens are left out.
        tokenizer: What made the ids: its facts go into `meta.json`, its file is not written.
        name: Name of the corpus.
        source: Where the text is from, for people.
        skipped: What was left out of the whole corpus.

    Raises:
        DiskError: A file could not be written.
    """
    place = folder / split
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    kept = [shard for shard in shards if shard.tokens]
    # One shard a line: long lists can be read and compared.
    lines = ",\n".join(json.dumps(asdict(shard)) for shard in kept)
    listing = f"[\n{lines}\n]\n".encode()
    write_synced(place / SHARDS_FILE, listing)
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
        offsets_sha256=_join_offsets(folder, split, kept),
    )
    write_synced(place / META_FILE, (json.dumps(asdict(meta), indent=2) + "\n").encode())
    sync_folder(place)
    return meta


def read_shards(folder: Path, meta: CorpusMeta) -> list[ShardEntry]:
    """The shards of a split in order.

    Raises:
        InputError: Their list is missing or contradicts the meta.
    """
    path = folder / meta.split / SHARDS_FILE
    try:
        shards = [ShardEntry(**values) for values in json.loads(path.read_bytes())]
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a prepared corpus has it in every split") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no list of shards: {error}") from error
    if (len(shards), documents, tokens) != (meta.shards, meta.documents, meta.tokens):
        raise InputError(
            f"{path} has {len(shards)} shards, {documents} documents and {tokens} tokens;"
            f" {META_FILE} says {meta.shards}, {meta.documents} and {meta.tokens}"
        )
    return shards


def read_meta(path: Path) -> CorpusMeta:
    """The content of a split's `meta.json`.

    Raises:
        InputError: It is missing, of another format, or not as described.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; a prepared corpus has {META_FILE} in every split")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {found!r}; {FORMAT_VERSION} can be read, which"
            " `ropepp prepare` makes"
        )
    types = get_type_hints(CorpusMeta)
    if values.keys() != types.keys():
        odd = sorted(values.keys() ^ types.keys())
        raise InputError(f"{path} has other keys than allowed: missing or unknown are {odd}")
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            allowed = getattr(kind, "__name__", kind)
            raise InputError(f"{path}: {key} is {values[key]!r}; it must be {allowed}")
    meta = CorpusMeta(**values)
    if meta.documents < 1:
        raise InputError(f"{path}: documents is {meta.documents}; at least 1 is needed")
    return meta


def _join_offsets(folder: Path, split: str, shards: Sequence[ShardEntry]) -> str:
    """Writes the starts of all documents and returns the file's checksum."""
    path, begin, digest = folder / split / OFFSETS_FILE, 0, hashlib.sha256()
    with disk_errors(path), path.open("wb") as file:
        for shard in shards:
            own = shard_folder(folder, shard.name, split) / OFFSETS_FILE
            offsets = np.fromfile(own, OFFSET_TYPE)
            # The end of one shard is the start of the next.
            content = (offsets[0 if begin == 0 else 1 :] + begin).astype(OFFSET_TYPE).tobytes()
            file.write(content)
            digest.update(content)
            begin += shard.tokens
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
