"""Documents of files, one by one, with whatever is wrong in them named."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ropepp.data.text.documents import BLOCK, BOM, IN_MEMORY, Text, decode, is_blank, scan
from ropepp.data.text.tables import read_table
from ropepp.errors import InputError
from ropepp.files import file_sha256, printable, read_errors

# `json` needs a line in memory, decodes a copy of it, and returns another copy of its text: up to
# 9 times the line's bytes, at 4 bytes a character. Longer lines are bad ones.
LINE_LIMIT = 64 << 20
# Compressed bytes handed over at a time. zstd may make 128 kB of 4 of them.
COMPRESSED = 1 << 13

REPORTED = 1000  # bad lines of a shard that are named; all are counted

OnBadLine = Literal["fail", "skip"]
Progress = Callable[[int], Any]  # takes the bytes read since the last call


@dataclass(frozen=True)
class Input:
    """A file as it was when the work began."""

    label: str  # what a corpus calls it: a path relative to the source
    size: int  # bytes on disk
    mtime_ns: int
    path: Path


@dataclass(frozen=True)
class Seen:
    """An input that was read to its end."""

    label: str
    size: int
    mtime_ns: int | float  # may be before 1970
    sha256: str


@dataclass
class Skipped:
    """What was left out of raw text; `reports` are the first bad lines: file, line, reason."""

    bad_lines: int = 0
    empty_documents: int = 0
    short_documents: int = 0
    reports: list[str] = field(default_factory=list, compare=False)

    def bad(self, file: str, line: str, reason: str) -> None:
        """Counts a bad line and keeps why it is one."""
        self.bad_lines += 1
        if len(self.reports) < REPORTED:
            self.reports.append("\t".join((file, line, " ".join(reason.split()))))


@dataclass
class Reader:
    """Reads documents; those of white space alone are left out."""

    key: str  # of the text in a JSON line, or its column
    on_bad_line: OnBadLine
    skipped: Skipped = field(default_factory=Skipped)  # counts what is left out
    progress: Progress = lambda _: None
    seen: list[Seen] = field(default_factory=list, init=False)  # read to their end, in order
    _digest: Any = field(default=None, init=False)  # of a file's blocks, as far as they were read

    def texts(self, inputs: tuple[Input, ...]) -> Iterator[Text]:
        """The documents of the inputs, in order.

        A `LongText` must be used before the next document is asked for: a file that changes in the
        meantime is noticed after that. Raises an `InputError` if text is not UTF-8, a file is
        damaged, has changed or is gone, or a line is bad (with file and line number)."""
        for item in inputs:
            for text in self._of_file(item):
                if is_blank(text):
                    self.skipped.empty_documents += 1
                else:
                    yield text

    def _of_file(self, item: Input) -> Iterator[Text]:
        kinds = {".txt": self._txt, ".parquet": self._table, ".arrow": self._table}
        with read_errors(item.path):
            try:
                _require_unchanged(item)
                self._digest = None
                yield from kinds.get(item.path.suffix.lower(), self._lines)(item)
                # What was read in blocks is not read once more for its sum.
                sha256 = self._digest.hexdigest() if self._digest else file_sha256(item.path)
            except (InputError, FileNotFoundError):
                # A file that was cut or exchanged looks damaged; say what really happened.
                _require_unchanged(item)
                raise
        _require_unchanged(item)
        self.seen.append(Seen(item.label, item.size, item.mtime_ns, sha256))

    def _txt(self, item: Input) -> Iterator[Text]:
        try:
            if item.size > IN_MEMORY:
                self.progress(item.size)
                yield scan(item.path)
            else:
                yield decode(b"".join(self._blocks(item.path)), str(item.path)).removeprefix(BOM)
        except InputError as error:
            self._bad(error, str(item.path), item.label, "-")

    def _table(self, item: Input) -> Iterator[Text]:
        for number, value in read_table(item.path, self.key, self.progress):
            place = f"{item.path}, row {number}"
            try:
                text = decode(value, place) if isinstance(value, bytes) else value
                yield _require_text(text, self.key, place)
            except InputError as error:
                self._bad(error, place, item.label, str(number))

    def _lines(self, item: Input) -> Iterator[Text]:
        found = self._blocks(item.path)
        if item.path.suffix.lower() in (".zst", ".gz"):
            if not item.size:
                what = "is empty; even a compressed file of nothing has bytes"
                raise InputError(f"{item.path} {what}")
            found = _decompress(item.path, found)
        for number, line, length, offset in _lines_of(found):
            place = f"{item.path}, line {number}"
            try:
                values = _object_of_line(line, length, place, offset)
                text = _text_of(values, self.key, place)
                if line and (b"\\ud" in line or b"\\uD" in line):  # no other text can have half
                    require_text(text, f"{place}: field {self.key!r}")
            except InputError as error:
                self._bad(error, place, item.label, str(number))
            else:
                del line, values  # a long text needs the room
                yield text

    def _blocks(self, path: Path) -> Iterator[bytes]:
        self._digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                self._digest.update(block)
                self.progress(len(block))
                yield block

    def _bad(self, error: InputError, place: str, label: str, line: str) -> None:
        if self.on_bad_line == "fail":
            raise InputError(f"{error}; or pass --on_bad_line skip") from error
        self.skipped.bad(label, line, str(error).removeprefix(f"{place}: "))


def read_text(path: Path) -> str:
    """A text file as it is, whatever its lines end with, without a byte order mark. Raises an
    `InputError` if it is not UTF-8, or cannot be read."""
    return decode(_bytes(path), printable(path)).removeprefix(BOM)


def read_column(path: Path, key: str) -> list[str]:
    """The texts under a key of the lines of a .jsonl file, in order; empty lines are none. Raises
    an `InputError` if it cannot be read, or a line is no object with a text there."""
    return [
        require_text(_text_of(values, key, place), f"{place}: field {key!r}")
        for place, values in read_objects(path)
    ]


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file's lines and where each stands; empty lines are none. Raises an
    `InputError` if it cannot be read, or a line is no object."""
    for number, line, length, offset in _lines_of(iter([_bytes(path)])):
        place = f"{printable(path)}, line {number}"
        yield place, _object_of_line(line, length, place, offset)


def require_text(text: str, place: str) -> str:
    """Refuses a text with half a surrogate pair, which no encoding has. Raises an `InputError` if
    it has one; `place` says where it is from."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} has half a surrogate pair; allowed is Unicode text") from error
    return text


def _bytes(path: Path) -> bytes:
    with read_errors(path):
        return path.read_bytes()


def _require_unchanged(item: Input) -> None:
    path = item.path
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} is gone; it was there when the work began") from None
    if (status.st_size, status.st_mtime_ns) != (item.size, item.mtime_ns):
        raise InputError(
            f"{path} has changed since the work began ({item.size} bytes then, {status.st_size}"
            " now); leave it alone and run again"
        )


def _object_of_line(line: bytes | None, length: int, place: str, offset: int) -> dict[str, Any]:
    if line is None:
        raise InputError(
            f"{place}: {length} bytes; allowed are up to {LINE_LIMIT} in a line (more fits into a"
            " .txt file)"
        )
    text = decode(line, place, offset)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise InputError(f"{place}: malformed JSON ({reason}); allowed is one object") from None
    except (ValueError, RecursionError) as error:
        # A ValueError of its own: numbers of too many digits.
        raise InputError(f"{place}: unreadable JSON ({error}); allowed is one object") from error
    if not isinstance(values, dict):
        raise InputError(f"{place}: found {type(values).__name__}; allowed is one JSON object")
    return values


def _text_of(values: dict[str, Any], key: str, place: str) -> str:
    if key not in values:
        keys = ", ".join(sorted(values)[:10]) or "none"
        raise InputError(f"{place}: no field {key!r}; fields are {keys}")
    return _require_text(values[key], key, place)


def _require_text(text: Any, key: str, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{place}: field {key!r} is {type(text).__name__}; allowed is a string")
    return text


def _decompress(path: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Any number of frames; the libraries' readers take a cut file for whole, or give out much."""
    begin, failure, name = _decompressor(path.suffix.lower())
    frame = None
    for block in blocks:
        view = memoryview(block)
        for at in range(0, len(view), COMPRESSED):
            rest: Any = view[at : at + COMPRESSED]
            while rest:
                frame = frame or begin()
                try:
                    yield frame.decompress(rest)
                except failure as error:
                    raise InputError(f"{path} is damaged or no {name} file: {error}") from error
                rest = frame.unused_data
                if frame.eof:
                    frame = None
    if frame is not None:
        raise InputError(f"{path} is cut off inside a {name} frame; allowed are complete files")


def _decompressor(suffix: str) -> tuple[Callable[[], Any], type[Exception], str]:
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error, "gzip"
    import zstandard

    # Files made with a long window say so; the library refuses more than 128 MB unless told.
    library = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return library.decompressobj, zstandard.ZstdError, "zstd"


def _lines_of(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None, int, int]]:
    """Number, content, length and first byte of each line that is not empty."""
    offset = 0
    for number, (line, length) in enumerate(_split_lines(blocks), start=1):
        own = line.removeprefix(BOM.encode()) if line is not None and number == 1 else line
        if own is None or own.strip():
            yield number, own, length, offset
        offset += length + 1


def _split_lines(blocks: Iterator[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Lines without their end and their lengths, in linear time even when a line spans many
    blocks; the content of one longer than `LINE_LIMIT` is dropped."""
    parts: list[bytes] = []
    length = 0
    for block in blocks:
        head, newline, tail = block.partition(b"\n")
        length += len(head)
        if length <= LINE_LIMIT:
            parts.append(head)
        else:
            parts.clear()
        if newline:
            *whole, last = tail.split(b"\n")
            yield _limited(parts, length)
            yield from (_limited([line], len(line)) for line in whole)
            parts, length = [last], len(last)
    if length:
        yield _limited(parts, length)


def _limited(parts: list[bytes], length: int) -> tuple[bytes | None, int]:
    return (b"".join(parts) if length <= LINE_LIMIT else None), length
