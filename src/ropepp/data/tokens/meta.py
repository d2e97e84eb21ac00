"""What is known about a prepared corpus: the content of its JSON files."""

import json
from dataclasses import MISSING, asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ropepp import __version__
from ropepp.data.text.skipped import Skipped
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.writer import META_FILE, TOKEN_TYPES, token_type
from ropepp.errors import InputError
from ropepp.files import write_synced

FORMAT_VERSION = 2
READABLE = (1, 2)  # in 1 there are no shards, and nothing is left out for its length or as a copy
SHARDS_FOLDER, SHARDS_FILE = "shards", "shards.json"


@dataclass(frozen=True)
class CorpusMeta:
    """The content of `meta.json`; `documents`, `tokens` and `text_bytes` count this split alone.

    `tokens` counts BOS and end-of-text, `text_bytes` the UTF-8 bytes of the documents. `bad_lines`,
    `empty_documents` and `short_documents` were left out of the whole corpus.
    `shards` is the number of them, 0 where tokens.bin lies in the split's own folder.
    """

    format_version: int
    ropepp_version: str
    name: str
    split: str
    source: str
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    bad_lines: int
    empty_documents: int
    vocab_size: int
    tokenizer: str
    tokenizer_fingerprint: str
    bos_id: int | None
    eot_id: int
    tokens_sha256: str
    offsets_sha256: str
    short_documents: int = 0
    shards: int = 0


@dataclass(frozen=True)
class Part:
    """A shard's documents of one split; `offsets` of its own begin at 0."""

    name: str
    documents: int
    tokens: int
    tokens_sha256: str
    offsets_sha256: str


def make_meta(
    tokenizer: Tokenizer,
    name: str,
    split: str,
    source: str,
    skipped: Skipped,
    facts: dict[str, Any],
) -> CorpusMeta:
    """The meta of a split; `facts` are those of `TokenFiles`, and `shards` where there are any."""
    left_out = asdict(skipped)
    del left_out["reports"]
    return CorpusMeta(
        format_version=FORMAT_VERSION,
        ropepp_version=__version__,
        name=name,
        split=split,
        source=source,
        dtype=token_type(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eot_id=tokenizer.eot_id,
        **facts,
        **left_out,
    )


def write_meta(place: Path, meta: CorpusMeta) -> None:
    """Writes the `meta.json` of a split's folder."""
    write_synced(place / META_FILE, (json.dumps(asdict(meta), indent=2) + "\n").encode())


def part_folder(folder: Path, name: str, split: str) -> Path:
    """Where a shard's files of a split lie."""
    return folder / SHARDS_FOLDER / name / split


def read_parts(folder: Path, meta: CorpusMeta) -> list[Part]:
    """The shards of a split in order; none where it has no shards.

    Raises:
        InputError: Their list is missing or contradicts the meta.
    """
    if not meta.shards:
        return []
    path = folder / meta.split / SHARDS_FILE
    try:
        parts = [Part(**values) for values in json.loads(path.read_bytes())]
        totals = tuple(sum(part[i] for part in map(astuple, parts)) for i in (1, 2))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a corpus of shards has it in every split") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no list of shards: {error}") from error
    if (len(parts), *totals) != (meta.shards, meta.documents, meta.tokens):
        raise InputError(
            f"{path} has {len(parts)} shards, {totals[0]} documents and {totals[1]} tokens;"
            f" {META_FILE} says {meta.shards}, {meta.documents} and {meta.tokens}"
        )
    return parts


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
    if found not in READABLE:
        allowed = " and ".join(map(str, READABLE))
        raise InputError(f"{path}: format_version is {found!r}; {allowed} can be read")
    types = get_type_hints(CorpusMeta)
    defaults = {item.name: item.default for item in fields(CorpusMeta)}
    added = {key: value for key, value in defaults.items() if value is not MISSING}
    values = added | values if found == 1 else values
    if values.keys() != types.keys():
        odd = sorted(values.keys() ^ types.keys())
        raise InputError(f"{path} has other keys than allowed: missing or unknown are {odd}")
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            allowed = getattr(kind, "__name__", kind)
            raise InputError(f"{path}: {key} is {values[key]!r}; it must be {allowed}")
    meta = CorpusMeta(**values)
    if meta.dtype not in TOKEN_TYPES:
        raise InputError(f"{path}: dtype is {meta.dtype!r}; allowed are {', '.join(TOKEN_TYPES)}")
    if meta.documents < 1:
        raise InputError(f"{path}: documents is {meta.documents}; at least 1 is needed")
    return meta
