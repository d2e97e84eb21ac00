"""Shards to a split of a corpus: the files that make them one."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ropepp import __version__
from ropepp.data.text.skipped import Skipped
from ropepp.data.tokens.meta import (
    FORMAT_VERSION,
    SHARDS_FILE,
    CorpusMeta,
    ShardEntry,
    shard_folder,
)
from ropepp.data.tokens.tokenizer import Tokenizer
from ropepp.data.tokens.writer import META_FILE, OFFSET_TYPE, OFFSETS_FILE
from ropepp.files import disk_errors, sync_folder, write_synced


def join_shards(
    folder: Path,
    split: str,
    shards: Sequence[ShardEntry],
    tokenizer: Tokenizer,
    name: str,
    source: str = "",
    skipped: Skipped | None = None,
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
    skipped = skipped or Skipped()
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
