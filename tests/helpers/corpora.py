"""Corpora as tests prepare them and read them back."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from ropepp.data.prepare.prepare import prepare
from ropepp.data.tokenizer import BytesTokenizer, Tokenizer
from ropepp.data.tokens.corpus import Corpus, ShardEntry, join_shards, shard_folder
from ropepp.data.tokens.writer import TokenWriter
from ropepp.records import checksum_of

FRACTION = 0.2


def in_validation(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < fraction * 2**64


def texts_of(tree: Path) -> Iterator[tuple[str, str]]:
    """Path and text of every good line, read in another way."""
    files = [path for path in tree.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.relative_to(tree).as_posix()):
        if file.suffix == ".gz":
            content = gzip.decompress(file.read_bytes())
        elif file.suffix == ".zst":
            content = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read()
        else:
            content = file.read_bytes()
        for line in content.splitlines():
            try:
                yield str(file), json.loads(line.decode())["text"] + ""
            except (ValueError, KeyError, TypeError):
                continue


def documents(folder: Path, split: str) -> list[str]:
    corpus = Corpus.open(folder, split)
    corpus.verify()
    tokenizer = corpus.load_tokenizer()
    found = [corpus.tokens[a:b].tolist() for a, b in pairwise(corpus.offsets.tolist())]
    assert all(ids[-1] == tokenizer.eot_id for ids in found)
    start = 0 if tokenizer.bos_id is None else 1
    assert all(ids[:start] == [tokenizer.bos_id] * start for ids in found)
    return [tokenizer.decode(ids[start:-1]) for ids in found]


def write_corpus(
    folder: Path,
    documents: Iterable[list[int]],
    tokenizer: Tokenizer | None = None,
    split: str = "train",
    shards: int = 1,
    **about: Any,
) -> Path:
    """Writes a split of some shards, of ids that need not be those of any text."""
    tokenizer, documents, entries = tokenizer or BytesTokenizer(), list(documents), []
    for number in range(shards):
        name = f"toy-{number}" if number else "toy"
        place = shard_folder(folder, name, split)
        place.mkdir(parents=True)
        with TokenWriter(place, tokenizer) as writer:
            for ids in documents[number::shards]:
                writer.append(ids, text_bytes=len(ids))
            writer.sync()
        entries.append(ShardEntry(name, **writer.counts_and_checksums()))
    join_shards(folder, split, entries, tokenizer, "toy", **about)
    return folder


def random_documents(draw: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    """Documents of bytes, of 1 to below `longest` of them."""
    lengths = draw.integers(1, longest, count)
    return [draw.integers(0, 256, length).tolist() for length in lengths]


def change_record(file: Path, **values: object) -> None:
    """Other values, with a checksum that fits: as a program writes them, not a disk."""
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "crc32"} | values
    file.write_text(json.dumps(content | {"crc32": checksum_of(content)}))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(source: Path | str, out: Path, tokenizer: str = "bytes", **options: Any) -> Path:
    options = {"validation_fraction": FRACTION, "on_bad_line": "skip"} | options
    return prepare(str(source), str(out), tokenizer, **options)
