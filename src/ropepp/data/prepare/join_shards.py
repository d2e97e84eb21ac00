"""Finished shards to a corpus: the files that make them one."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ropepp.data.prepare.encode import BAD_LINES_FILE, ShardMeta
from ropepp.data.text.skipped import Skipped
from ropepp.data.text.sources import Source
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.meta import (
    SHARDS_FILE,
    SHARDS_FOLDER,
    CorpusMeta,
    Part,
    make_meta,
    part_folder,
    write_meta,
)
from ropepp.data.tokens.writer import OFFSET_TYPE, OFFSETS_FILE
from ropepp.files import disk_errors, sync_folder, write_synced


def assemble(
    folder: Path, metas: list[ShardMeta], tokenizer: Tokenizer, source: Source
) -> dict[str, CorpusMeta]:
    """Makes the folder a corpus of these shards, in this order; tokens are not copied.

    A single shard's files become the corpus's own, as `CorpusWriter` lays them out.

    Returns:
        The meta of each split.

    Raises:
        DiskError: A file could not be written.
    """
    left_out = total_skipped(metas)
    reports = [folder / SHARDS_FOLDER / meta.name / BAD_LINES_FILE for meta in metas]
    lines = b"".join(report.read_bytes() for report in reports if report.exists())
    if lines:
        write_synced(folder / BAD_LINES_FILE, lines)
    corpus = {}
    for split in metas[0].splits:
        place = folder / split
        shutil.rmtree(place, ignore_errors=True)
        if len(metas) == 1:
            facts = metas[0].splits[split]
            with disk_errors(place):
                part_folder(folder, metas[0].name, split).rename(place)
        else:
            place.mkdir()
            facts = _join(folder, split, metas)
        meta = make_meta(tokenizer, source.name, split, source.given, left_out, facts)
        write_meta(place, meta)
        sync_folder(place)
        corpus[split] = meta
    if len(metas) == 1:
        shutil.rmtree(folder / SHARDS_FOLDER)
    return corpus


def total_skipped(metas: list[ShardMeta]) -> Skipped:
    """What was left out of all shards."""
    return Skipped(
        bad_lines=sum(meta.bad_lines for meta in metas),
        empty_documents=sum(meta.empty_documents for meta in metas),
        short_documents=sum(meta.short_documents for meta in metas),
    )


def _join(folder: Path, split: str, metas: list[ShardMeta]) -> dict[str, int | str]:
    """Writes the list of shards and the offsets of all documents; a split's facts."""
    kept = [(meta.name, meta.splits[split]) for meta in metas if meta.splits[split]["tokens"]]
    parts = [
        Part(
            name,
            facts["documents"],
            facts["tokens"],
            facts["tokens_sha256"],
            facts["offsets_sha256"],
        )
        for name, facts in kept
    ]
    # One shard a line: long lists can be read and compared.
    lines = ",\n".join(json.dumps(asdict(part)) for part in parts)
    listing = f"[\n{lines}\n]\n".encode()
    write_synced(folder / split / SHARDS_FILE, listing)
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "text_bytes": sum(facts["text_bytes"] for _, facts in kept),
        "tokens_sha256": hashlib.sha256(listing).hexdigest(),
        "offsets_sha256": _join_offsets(folder, split, parts),
        "shards": len(parts),
    }


def _join_offsets(folder: Path, split: str, parts: list[Part]) -> str:
    """Writes the starts of all documents and returns the file's checksum."""
    path, begin, digest = folder / split / OFFSETS_FILE, 0, hashlib.sha256()
    with disk_errors(path), path.open("wb") as file:
        for part in parts:
            offsets = np.fromfile(part_folder(folder, part.name, split) / OFFSETS_FILE, OFFSET_TYPE)
            # The end of one shard is the start of the next.
            content = (offsets[0 if begin == 0 else 1 :] + begin).astype(OFFSET_TYPE).tobytes()
            file.write(content)
            digest.update(content)
            begin += part.tokens
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
