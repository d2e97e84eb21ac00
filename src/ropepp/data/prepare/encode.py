"""One shard of input to one shard of a corpus: whole or not at all, and found again later."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ropepp import __version__
from ropepp.data.prepare.safe_cuts import PIECE, pieces
from ropepp.data.prepare.workers import Report
from ropepp.data.text.documents import Text, blocks, cut, text_bytes, text_sha256
from ropepp.data.text.readers import Input, OnBadLine, Reader, Seen, Skipped
from ropepp.data.text.sources import Shard
from ropepp.data.tokenizer import Tokenizer, encode_behind, load_tokenizer, num_threads
from ropepp.data.tokens.corpus import SHARDS_FOLDER, ShardEntry, check_sha256, verify_shard
from ropepp.data.tokens.reader import check_size
from ropepp.data.tokens.writer import (
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKEN_TYPES,
    TOKENS_FILE,
    TokenWriter,
    token_type,
)
from ropepp.errors import InputError
from ropepp.files import disk_errors, file_sha256, replacing_folder, sync_folder, write_synced
from ropepp.records import as_record, read_record, write_record

TRAIN, VALIDATION = "train", "validation"
BAD_LINES_FILE = "bad_lines.tsv"
# Encoded at a time: enough for every core; with one, so few that they stay in its cache.
BATCH_CHARACTERS, BATCH_CHARACTERS_ALONE = 1 << 21, 1 << 16


@dataclass(frozen=True)
class Settings:
    """What decides a shard's files besides its input."""

    tokenizer: str  # its fingerprint
    key: str  # or column, of the text
    validation_fraction: float  # of the documents
    min_tokens: int  # documents with fewer are left out
    only_one: bool  # there is one document in all, whose end is for validation
    ropepp_version: str = __version__

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION) if self.validation_fraction > 0 else (TRAIN,)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class ShardMeta:
    """The content of a shard's `meta.json`."""

    name: str
    settings_sha256: str
    inputs: list[dict[str, Any]]  # `Seen` of each
    dtype: str
    bad_lines: int
    empty_documents: int
    short_documents: int
    shares: list[float]  # smallest and largest number that decided on a document's split
    splits: dict[str, dict[str, Any]]  # counts and checksums
    bad_lines_sha256: str | None

    def entry(self, split: str) -> ShardEntry:
        """What is known of the files of a split; an `InputError` if that is something else."""
        values = {"name": self.name, **self.splits.get(split, {})}
        return as_record(values, ShardEntry, f"{META_FILE} of shard {self.name}")


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to know."""

    folder: Path  # the corpus's
    shard: Shard
    settings: Settings
    tokenizer: str  # for `load_tokenizer`
    on_bad_line: OnBadLine
    previous: Path | None = None  # a corpus whose shard is taken over if it would be the same

    @property
    def label(self) -> str:
        return self.shard.label

    @property
    def place(self) -> Path:
        """The shard's folder."""
        return self.folder / SHARDS_FOLDER / self.shard.name


def finish_shard(job: ShardJob, report: Report) -> ShardMeta:
    """Sees to it that a shard is there, from an earlier run or a previous corpus if its files are
    what was written. Raises an `InputError` if the input cannot be read, or the disk is full."""
    meta = finished_shard(job, verify=True)
    if meta is None and job.previous is not None:
        old = replace(job, folder=job.previous)
        meta = finished_shard(old, verify=True)
        meta = meta if meta is None or _link(old, job.place) else None
    if meta is None:
        return encode_shard(job, report)
    report(job.shard.size)
    return meta


def _link(old: ShardJob, place: Path) -> bool:
    """Takes over a shard without a copy; False where the file system has no links."""
    try:
        with replacing_folder(place, overwrite=True, clear=False) as work:
            shutil.copytree(old.place, work, copy_function=os.link, dirs_exist_ok=True)
            for split in old.settings.splits:
                sync_folder(work / split)
    except (OSError, shutil.Error):
        return False
    return True


def encode_shard(job: ShardJob, report: Report) -> ShardMeta:
    """Writes a shard's folder; nothing is there under its name before everything is. Raises an
    `InputError` if the input cannot be read, or the disk is full."""
    tokenizer = _tokenizer(job.tokenizer, job.settings.tokenizer)
    reader = Reader(job.settings.key, job.on_bad_line, progress=report)
    with (
        disk_errors(job.place),
        replacing_folder(job.place, overwrite=True, clear=False) as place,
        ExitStack() as stack,
    ):
        files = {}
        for split in job.settings.splits:
            (place / split).mkdir()
            files[split] = stack.enter_context(TokenWriter(place / split, tokenizer))
        shares = [1.0, 0.0]
        encoder = _Encoder(tokenizer, files, job.settings.min_tokens, reader.skipped, report)
        encoder.run(split_texts(reader.texts(job.shard.inputs), job.settings, shares))
        for split, written in files.items():
            written.sync()
            sync_folder(place / split)
        counts = {split: written.counts_and_checksums() for split, written in files.items()}
        left_out = asdict(reader.skipped)
        reports = left_out.pop("reports")
        content = "".join(f"{report}\n" for report in reports).encode(errors="backslashreplace")
        if content:
            write_synced(place / BAD_LINES_FILE, content)
        meta = ShardMeta(
            name=job.shard.name,
            settings_sha256=job.settings.sha256,
            inputs=[asdict(seen) for seen in reader.seen],
            dtype=token_type(tokenizer.vocab_size).name,
            shares=shares,
            splits=counts,
            bad_lines_sha256=hashlib.sha256(content).hexdigest() if content else None,
            **left_out,
        )
        write_record(place / META_FILE, meta)
    return meta


def finished_shard(job: ShardJob, verify: bool = False) -> ShardMeta | None:
    """The meta of a shard that an earlier run finished, if this one would write the same: inputs
    are compared by size and time; by their checksum where the time alone differs.

    With `verify` its files are read; one that is damaged is named, and there is no such shard."""
    if not (job.place / META_FILE).is_file():
        return None
    try:
        meta = read_shard(job.place)
        seen = [as_record(item, Seen, meta.name) for item in meta.inputs]
        same = (
            meta.settings_sha256 == job.settings.sha256
            and (meta.bad_lines == 0 or job.on_bad_line == "skip")
            and len(seen) == len(job.shard.inputs)
            and all(map(_is_same, seen, job.shard.inputs))
        )
        if same:
            check_shard(job.place, meta, job.settings.splits, verify)
    except (InputError, OSError) as error:
        print(f"{error}; the shard is made again", file=sys.stderr)
        return None
    return meta if same else None


def check_shard(place: Path, meta: ShardMeta, splits: Iterable[str], verify: bool) -> None:
    """Compares a shard's files with its meta: their sizes, or their content too. Raises an
    `InputError` if a file is missing or not what was written."""
    types = {dtype.name: dtype for dtype in TOKEN_TYPES}
    if meta.dtype not in types:
        raise InputError(f"{place / META_FILE}: dtype is {meta.dtype!r}; allowed are {list(types)}")
    dtype = types[meta.dtype]
    for split in splits:
        entry = meta.entry(split)
        check_size(place / split / TOKENS_FILE, dtype, entry.tokens)
        check_size(place / split / OFFSETS_FILE, OFFSET_TYPE, entry.documents + 1)
        if verify:
            verify_shard(place / split, entry, dtype, 256**dtype.itemsize)


def read_shard(place: Path) -> ShardMeta:
    """What is known of the shard in a folder, after a look at its small files. Raises an
    `InputError` if one is missing or damaged."""
    meta = read_record(place / META_FILE, ShardMeta)
    if meta.name != place.name:
        raise InputError(f"{place / META_FILE}: name is {meta.name!r:.80}; it must be the folder's")
    if meta.bad_lines_sha256 is not None:
        check_sha256(place / BAD_LINES_FILE, meta.bad_lines_sha256)
    return meta


def _is_same(seen: Seen, item: Input) -> bool:
    return (seen.label, seen.size) == (item.label, item.size) and (
        seen.mtime_ns == item.mtime_ns or file_sha256(item.path) == seen.sha256
    )


def split_texts(
    texts: Iterable[Text], settings: Settings, shares: list[float]
) -> Iterator[tuple[str, Text]]:
    """Documents with the split of each; `shares` keeps the least and largest that decided."""
    fraction = settings.validation_fraction
    for text in texts:
        if settings.only_one and fraction > 0:
            yield from zip((TRAIN, VALIDATION), cut(text, fraction), strict=True)
        else:
            # From 0 to 1, by the text alone; validation has the lowest.
            share = int.from_bytes(text_sha256(text)[:8], "big") / 2**64
            shares[:] = min(shares[0], share), max(shares[1], share)
            yield (VALIDATION if share < fraction else TRAIN), text


@dataclass(frozen=True)
class _Encoder:
    """Texts to token files, in batches; long ones piece by piece."""

    tokenizer: Tokenizer
    files: dict[str, TokenWriter]
    min_tokens: int
    skipped: Skipped
    report: Report

    def run(self, found: Iterator[tuple[str, Text]]) -> None:
        batch: list[tuple[str, str]] = []
        characters = 0
        limit = BATCH_CHARACTERS if num_threads() > 1 else BATCH_CHARACTERS_ALONE
        for split, text in found:
            if not isinstance(text, str) or len(text) > PIECE:
                self._encode(batch)
                self._encode_long(split, text)
                batch, characters = [], 0
                continue
            batch.append((split, text))
            characters += len(text)
            if characters >= limit:
                self._encode(batch)
                batch, characters = [], 0
        self._encode(batch)

    def _encode(self, batch: list[tuple[str, str]]) -> None:
        encoded = self.tokenizer.encode_batch([text for _, text in batch])
        tokens = 0
        for (split, text), ids in zip(batch, encoded, strict=True):
            if len(ids) < self.min_tokens:
                self.skipped.short_documents += 1
            else:
                self.files[split].append(ids, text_bytes(text))
                tokens += len(ids)
        self.report(0, len(batch), tokens)

    def _encode_long(self, split: str, text: Text) -> None:
        out, begun = self.files[split], False
        ids: list[int] = []
        encode = self.tokenizer.encode_batch
        for piece in pieces(blocks(text), self.tokenizer):
            # Held back until the document is known to be long enough.
            ids += encode([piece])[0]
            encode = partial(encode_behind, self.tokenizer)
            if len(ids) >= self.min_tokens and not begun:
                begun = True
                out.begin()
            if begun:
                out.extend(ids)
                self.report(0, 0, len(ids))
                ids = []
        if begun:
            out.finish(text_bytes(text))
        else:
            self.skipped.short_documents += 1
        self.report(0, 1, 0)


@lru_cache(maxsize=1)
def _tokenizer(path_or_kind: str, fingerprint: str) -> Tokenizer:
    """Loaded once a process; the fingerprint tells apart what lay in the same place."""
    found = load_tokenizer(path_or_kind)
    if found.fingerprint != fingerprint:
        raise InputError(f"the tokenizer in {path_or_kind} was exchanged; run again")
    return found
