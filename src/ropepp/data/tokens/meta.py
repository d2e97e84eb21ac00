"""What is known about a prepared corpus: the content of its JSON files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from ropepp.data.tokens.writer import META_FILE
from ropepp.errors import InputError

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
