"""Looking at a prepared corpus."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from ropepp.data.prepare.encode import check_shard, read_shard
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.corpus import SHARDS_FOLDER, Corpus
from ropepp.data.tokens.writer import META_FILE, OFFSETS_FILE
from ropepp.errors import InputError

SHOWN_DOCUMENTS, SHOWN_TOKENS = 3, 48
BAR = 40  # characters of the longest bar


def inspect(folder: str | Path) -> str:
    """Counts, lengths and the first documents of a prepared corpus, as text for people. Raises an
    `InputError` if the folder is no prepared corpus."""
    corpora = _open(Path(folder))
    meta = corpora[0].meta
    bits = 8 * corpora[0].tokens.dtype.itemsize
    lines = [
        f"{folder}: {meta.name}, from {meta.source or 'an unknown source'}",
        f"tokenizer {meta.tokenizer}, vocabulary of {meta.vocab_size}, {bits} bits a token,"
        f" fingerprint {meta.tokenizer_fingerprint[:12]}",
        f"left out: {meta.bad_lines:,} bad lines, {meta.empty_documents:,} empty documents,"
        f" {meta.short_documents:,} short documents",
    ]
    for corpus in corpora:
        meta = corpus.meta
        lines += [
            "",
            f"{meta.split}: {meta.documents:,} documents, {meta.tokens:,} tokens,"
            f" {meta.text_bytes:,} bytes of text, {meta.text_bytes / meta.tokens:.2f} bytes a"
            f" token; shards in {SHARDS_FOLDER}/: {meta.shards:,}",
            *_histogram(corpus),
            *_first_documents(corpus, corpus.load_tokenizer()),
        ]
    return "\n".join(lines) + "\n"


def verify(folder: str | Path) -> str:
    """Compares all files of a prepared corpus with their checksums, and says what was read, a line
    for each split. Raises an `InputError` if a file is missing or is not what was written."""
    lines, corpora = [], _open(Path(folder))
    there = {corpus.meta.split for corpus in corpora}
    for place in sorted((Path(folder) / SHARDS_FOLDER).iterdir()):
        meta = read_shard(place)
        lost = [split for split in meta.splits if meta.entry(split).tokens and split not in there]
        if lost:
            raise InputError(f"{Path(folder, lost[0])} is missing; {place} has tokens of it")
        # The others are in the list of the split.
        empty = [split for split in meta.splits if not meta.entry(split).tokens]
        check_shard(place, meta, empty, verify=True)
    for corpus in corpora:
        corpus.verify()
        corpus.load_tokenizer()
        lines.append(
            f"{corpus.meta.split}: {corpus.meta.documents:,} documents,"
            f" {corpus.meta.tokens:,} tokens (shards: {corpus.meta.shards:,}) are as written"
        )
    return "\n".join(lines) + "\n"


def _open(folder: Path) -> list[Corpus]:
    # One file is enough to know a split, which then complains if the other is missing.
    files = [*folder.glob(f"*/{META_FILE}"), *folder.glob(f"*/{OFFSETS_FILE}")]
    splits = sorted({file.parent.name for file in files})
    if not splits:
        raise InputError(f"{folder} is no prepared corpus; `ropepp prepare` makes one")
    return [Corpus.open(folder, split) for split in splits]


def _histogram(corpus: Corpus) -> list[str]:
    """Documents and their share of the tokens by length, in powers of two."""
    lengths = np.diff(corpus.offsets)
    powers = np.frexp(lengths.astype(np.float64))[1] - 1
    counts, sums = np.bincount(powers), np.bincount(powers, weights=lengths)
    shortest, longest = lengths.min(), lengths.max()
    lines = [f"  lengths from {shortest:,} to {longest:,} tokens, BOS and end-of-text counted:"]
    for power in range(powers.min(), powers.max() + 1):
        bar = "#" * int(np.ceil(BAR * counts[power] / counts.max()))
        share = sums[power] / len(corpus.tokens)
        lines.append(f"  {2**power:>12,} {counts[power]:>14,} {share:>6.1%} of tokens {bar}")
    return [line.rstrip() for line in lines]


def _first_documents(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    lines = [f"  first {SHOWN_TOKENS} tokens of the first documents:"]
    for start, stop in pairwise(corpus.offsets[: SHOWN_DOCUMENTS + 1].tolist()):
        shown = min(stop, start + SHOWN_TOKENS)
        more = " ..." if shown < stop else ""
        lines.append(f"  {tokenizer.decode(corpus.tokens[start:shown].tolist())!r}{more}")
    return lines
