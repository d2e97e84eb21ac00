"""A prepared corpus on disk: token ids, document offsets and what is known about them.

A corpus is a folder with the tokenizer's file (none for `bytes`) and a sub-folder for each split:

    tokens.bin    ids, little-endian; uint16 when the vocabulary has at most 65536 ids, otherwise
    uint32 offsets.bin   int64, little-endian; documents + 1 numbers, the first 0, the last the
    number of tokens meta.json     `CorpusMeta`

Every document is stored as [BOS if the tokenizer has one] + ids + [end-of-text].
"""

import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from ropepp import __version__
from ropepp.data.files import replacing_folder, write_synced
from ropepp.data.tokenizer import Tokenizer, load_tokenizer
from ropepp.errors import InputError

FORMAT_VERSION = 1
TOKENS_FILE, OFFSETS_FILE, META_FILE = "tokens.bin", "offsets.bin", "meta.json"
TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET_TYPE: np.dtype[Any] = np.dtype("<i8")
CHUNK = 1 << 22  # numbers looked at, or buffered, at a time


@dataclass(frozen=True)
class CorpusMeta:
    """The content of `meta.json`; `documents`, `tokens` and `text_bytes` count this split alone.

    `tokens` counts BOS and end-of-text, `text_bytes` the UTF-8 bytes of the documents. `bad_lines`
    and `empty_documents` were left out of the whole corpus.
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


@dataclass
class Skipped:
    """What a reader of raw text left out."""

    bad_lines: int = 0
    empty_documents: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a prepared corpus, memory-mapped; build it with `Corpus.open`.

    Attributes:
        folder: The corpus's folder.
        tokens: (tokens,) uint16 or uint32, read-only.
        offsets: (documents + 1,) int64, read-only; document d is `tokens[offsets[d] : offsets[d +
            1]]`.
        meta: Counts, tokenizer, checksums.
    """

    folder: Path
    tokens: NDArray[Any]
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
        meta = _read_meta(place / META_FILE)
        tokens = _map(place / TOKENS_FILE, TOKEN_TYPES[meta.dtype], meta.tokens)
        offsets = _map(place / OFFSETS_FILE, OFFSET_TYPE, meta.documents + 1)
        _check_offsets(place / OFFSETS_FILE, offsets, meta.tokens)
        return cls(folder, tokens, offsets, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: pickling an array would copy the corpus.
        return Corpus.open, (self.folder, self.meta.split)

    def verify(self) -> None:
        """Reads everything: checksums, and that every id is below the vocabulary's size.

        Raises:
            InputError: A file is not what was written.
        """
        place = self.folder / self.meta.split
        for name, expected in (
            (TOKENS_FILE, self.meta.tokens_sha256),
            (OFFSETS_FILE, self.meta.offsets_sha256),
        ):
            with (place / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise InputError(f"{place / name} has sha256 {found}; {META_FILE} says {expected}")
        for start in range(0, len(self.tokens), CHUNK):
            largest = int(self.tokens[start : start + CHUNK].max())
            if largest >= self.meta.vocab_size:
                raise InputError(
                    f"{place / TOKENS_FILE} has the id {largest};"
                    f" ids must be below vocab_size {self.meta.vocab_size}"
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
        self.documents = self.tokens = self.text_bytes = 0
        self._target = Path(folder) / split
        self._dtype_name = "uint16" if tokenizer.vocab_size <= 65536 else "uint32"
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
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
            _NumberFile(place / TOKENS_FILE, TOKEN_TYPES[self._dtype_name]) as self._tokens,
            _NumberFile(place / OFFSETS_FILE, OFFSET_TYPE) as self._offsets,
        ):
            self._offsets.append([0])
            yield
            if not self.documents:
                raise InputError(f"{self._target} would have no documents; at least 1 is needed")
            self._tokens.sync()
            self._offsets.sync()
            meta = json.dumps(asdict(self._meta()), indent=2) + "\n"
            write_synced(place / META_FILE, meta.encode())

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends a document.

        Args:
            ids: The document's ids, without BOS and end-of-text.
            text_bytes: Number of UTF-8 bytes of its text.
        """
        document = [*self._start, *ids, self.tokenizer.eot_id]
        self._tokens.append(document)
        self.documents += 1
        self.tokens += len(document)
        self.text_bytes += text_bytes
        self._offsets.append([self.tokens])

    def _meta(self) -> CorpusMeta:
        return CorpusMeta(
            format_version=FORMAT_VERSION,
            ropepp_version=__version__,
            name=self.name,
            split=self.split,
            source=self.source,
            dtype=self._dtype_name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            bad_lines=self.skipped.bad_lines,
            empty_documents=self.skipped.empty_documents,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer=self.tokenizer.kind,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            bos_id=self.tokenizer.bos_id,
            eot_id=self.tokenizer.eot_id,
            tokens_sha256=self._tokens.sha256,
            offsets_sha256=self._offsets.sha256,
        )


class _NumberFile:
    """A file of numbers, written through a buffer, that knows its checksum."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._buffer = array(dtype.char)
        self._digest = hashlib.sha256()

    def __enter__(self) -> "_NumberFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, numbers: list[int]) -> None:
        self._buffer.fromlist(numbers)
        if len(self._buffer) >= CHUNK:
            self._flush()

    def sync(self) -> None:
        """Puts everything on the disk."""
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _flush(self) -> None:
        if sys.byteorder == "big":
            self._buffer.byteswap()
        self._file.write(self._buffer)
        self._digest.update(self._buffer)
        del self._buffer[:]


def _read_meta(path: Path) -> CorpusMeta:
    if not path.is_file():
        raise InputError(f"{path} is missing; a prepared corpus has {META_FILE} in every split")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {found!r}; {FORMAT_VERSION} can be read")
    types = get_type_hints(CorpusMeta)
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


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing; a prepared corpus has it in every split")
    found, expected = path.stat().st_size, count * dtype.itemsize
    if found != expected:
        raise InputError(f"{path} has {found} bytes; {META_FILE} says {expected}")
    # A plain array over the map: slicing np.memmap itself is several times slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


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
