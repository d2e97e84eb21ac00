"""A prepared corpus on disk: token ids, document offsets and what is known about them.

A corpus is a folder with the tokenizer's file (none for `bytes`) and a sub-folder for each split:

    meta.json     `CorpusMeta`
    tokens.bin    ids, little-endian; uint16 when the vocabulary has at most 65536 ids, otherwise
                  uint32
    offsets.bin   int64, little-endian; documents + 1 numbers, the first 0, the last the number of
                  tokens

Every document is stored as [BOS if the tokenizer has one] + ids + [end-of-text].

A corpus of many shards has no tokens.bin there. Its split has `shards.json`, a list of `Part`, and
the ids are those of `shards/NAME/SPLIT/tokens.bin` one after another. Its `tokens_sha256` is that
of `shards.json`, which has the shards' own.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropepp.data.text.skipped import Skipped
from ropepp.data.tokenizer import Tokenizer, load_tokenizer
from ropepp.data.tokens.meta import (
    SHARDS_FILE,
    CorpusMeta,
    Part,
    make_meta,
    part_folder,
    read_meta,
    read_parts,
    write_meta,
)
from ropepp.data.tokens.writer import (
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    TOKEN_TYPES,
    TOKENS_FILE,
    ShardedTokens,
    TokenFiles,
    check_size,
    map_numbers,
)
from ropepp.errors import InputError
from ropepp.files import replacing_folder

__all__ = ["Corpus", "CorpusMeta", "CorpusWriter", "Part"]

CHUNK = 1 << 22  # numbers looked at at a time


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a prepared corpus, memory-mapped; build it with `Corpus.open`.

    Attributes:
        folder: The corpus's folder.
        tokens: (tokens,) uint16 or uint32, read-only; has a length and gives arrays for slices.
        offsets: (documents + 1,) int64, read-only; document d is `tokens[offsets[d] : offsets[d +
            1]]`.
        meta: Counts, tokenizer, checksums.
    """

    folder: Path
    tokens: NDArray[Any] | ShardedTokens
    offsets: NDArray[np.int64]
    meta: CorpusMeta

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "Corpus":
        """Maps a split after checking that its files fit each other (not their checksums:
        `verify`).

        Args:
            folder: The corpus's folder.
            split: "train" or "validation".

        Raises:
            InputError: A file is missing, cut off, of another format, or contradicts `meta.json`.
        """
        folder = Path(folder)
        place = folder / split
        if not place.is_dir():
            raise InputError(
                f"{place} is no folder; `ropepp prepare` makes it (validation if its"
                " validation_fraction is above 0)"
            )
        meta = read_meta(place / META_FILE)
        dtype = TOKEN_TYPES[meta.dtype]
        offsets = map_numbers(place / OFFSETS_FILE, OFFSET_TYPE, meta.documents + 1)
        _check_offsets(place / OFFSETS_FILE, offsets, meta.tokens)
        tokens: NDArray[Any] | ShardedTokens
        if meta.shards:
            parts = [
                (part_folder(folder, part.name, split) / TOKENS_FILE, part.tokens)
                for part in read_parts(folder, meta)
            ]
            for path, count in parts:
                check_size(path, dtype, count)
            # One shard alone is read as fast as a corpus without shards.
            tokens = (
                ShardedTokens(parts, dtype)
                if parts[1:]
                else map_numbers(parts[0][0], dtype, parts[0][1])
            )
        else:
            tokens = map_numbers(place / TOKENS_FILE, dtype, meta.tokens)
        return cls(folder, tokens, offsets, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: pickling an array would copy the corpus.
        return Corpus.open, (self.folder, self.meta.split)

    def parts(self) -> list[Part]:
        """The shards in order; none where tokens.bin lies in the split's own folder.

        Raises:
            InputError: Their list is missing or contradicts the meta.
        """
        return read_parts(self.folder, self.meta)

    def verify(self) -> None:
        """Reads everything: checksums, and that every id is below the vocabulary's size.

        Raises:
            InputError: A file is not what was written.
        """
        place, meta = self.folder / self.meta.split, self.meta
        files = [
            (place / (SHARDS_FILE if meta.shards else TOKENS_FILE), meta.tokens_sha256),
            (place / OFFSETS_FILE, meta.offsets_sha256),
        ]
        for part in self.parts():
            shard = part_folder(self.folder, part.name, meta.split)
            files += [
                (shard / TOKENS_FILE, part.tokens_sha256),
                (shard / OFFSETS_FILE, part.offsets_sha256),
            ]
        for path, expected in files:
            _check_sha256(path, expected)
        for start in range(0, len(self.tokens), CHUNK):
            largest = int(self.tokens[start : start + CHUNK].max())
            if largest >= meta.vocab_size:
                raise InputError(
                    f"{place / TOKENS_FILE} has the id {largest};"
                    f" ids must be below vocab_size {meta.vocab_size}"
                )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            InputError: The corpus's tokenizer file is missing or was exchanged.
        """
        tokenizer = load_tokenizer("bytes" if self.meta.tokenizer == "bytes" else self.folder)
        if tokenizer.fingerprint != self.meta.tokenizer_fingerprint:
            raise InputError(
                f"{self.folder} has a tokenizer with fingerprint {tokenizer.fingerprint};"
                f" {META_FILE} says {self.meta.tokenizer_fingerprint}"
            )
        return tokenizer


class CorpusWriter:
    """Writes one split, document by document, in bounded memory; a context manager.

    The split appears under its name when the block ends well, and not at all when it raises.

    Args:
        folder: The corpus's folder.
        split: Name of the split, which must not exist in the folder yet.
        tokenizer: What made the ids: its facts go into `meta.json`, its file is not written.
        name: Name of the corpus.
        source: Where the text is from, for people.
        skipped: What the reader of the text leaves out; looked at when the block ends.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        tokenizer: Tokenizer,
        name: str,
        source: str = "",
        skipped: Skipped | None = None,
    ) -> None:
        self.split, self.tokenizer, self.name, self.source = split, tokenizer, name, source
        self.skipped = skipped or Skipped()
        self._target = Path(folder) / split
        self._context = self._writing()

    def __enter__(self) -> "CorpusWriter":
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with (
            replacing_folder(self._target) as place,
            TokenFiles(place, self.tokenizer) as self._files,
        ):
            yield
            if not self._files.documents:
                raise InputError(f"{self._target} would have no documents; at least 1 is needed")
            self._files.sync()
            meta = make_meta(
                self.tokenizer,
                self.name,
                self.split,
                self.source,
                self.skipped,
                self._files.facts(),
            )
            write_meta(place, meta)

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends a document.

        Args:
            ids: The document's ids, without BOS and end-of-text.
            text_bytes: Number of UTF-8 bytes of its text.

        Raises:
            InputError: An id is not in the vocabulary (noticed here or when the block ends).
        """
        self._files.append(ids, text_bytes)

    @property
    def documents(self) -> int:
        return self._files.documents

    @property
    def tokens(self) -> int:
        return self._files.tokens

    @property
    def text_bytes(self) -> int:
        return self._files.text_bytes


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{path} has sha256 {found}; {META_FILE} says {expected}")


def _check_offsets(path: Path, offsets: NDArray[np.int64], tokens: int) -> None:
    ends = int(offsets[0]), int(offsets[-1])
    if ends != (0, tokens):
        raise InputError(f"{path} runs from {ends[0]} to {ends[1]}; expected 0 to {tokens}")
    for start in range(0, len(offsets) - 1, CHUNK):
        falls = np.flatnonzero(np.diff(offsets[start : start + CHUNK + 1]) <= 0)
        if len(falls):
            at = start + int(falls[0])
            raise InputError(
                f"{path} has {offsets[at]} then {offsets[at + 1]} at document {at};"
                " offsets must increase"
            )
