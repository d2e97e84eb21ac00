"""A document's text: in memory, or a file too long for it that is read in parts."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ropepp.errors import InputError

BLOCK = 1 << 18  # bytes or characters read at a time
IN_MEMORY = 16 << 20  # bytes of a .txt file up to which it is read whole


@dataclass(frozen=True)
class LongText:
    """Bytes `start` to `stop` of a UTF-8 file, with what one reading found out.

    Attributes:
        path: The file.
        start: First byte.
        stop: One more than the last byte.
        digest: sha256 of these bytes.
        blank: Whether there is nothing but white space.
    """

    path: Path
    start: int
    stop: int
    digest: bytes
    blank: bool


Text = str | LongText


def scan(path: Path, start: int = 0, stop: int | None = None) -> LongText:
    """Reads a file, or some bytes of it, once.

    Raises:
        InputError: It is not UTF-8.
    """
    stop = path.stat().st_size if stop is None else stop
    digest, blank = hashlib.sha256(), True
    for block in _decoded(path, start, stop):
        digest.update(block.encode())
        blank = blank and block.isspace()
    return LongText(path, start, stop, digest.digest(), blank)


def blocks(text: Text) -> Iterator[str]:
    """The text in parts of about `BLOCK` characters.

    Raises:
        InputError: A file is no longer what it was.
    """
    if isinstance(text, str):
        yield from (text[at : at + BLOCK] for at in range(0, len(text), BLOCK))
    else:
        yield from _decoded(text.path, text.start, text.stop)


def digest_and_size(text: Text) -> tuple[bytes, int]:
    """sha256 and number of bytes of the text in UTF-8."""
    if isinstance(text, str):
        content = text.encode()
        return hashlib.sha256(content).digest(), len(content)
    return text.digest, text.stop - text.start


def is_blank(text: Text) -> bool:
    """Whether there is nothing but white space."""
    return (not text or text.isspace()) if isinstance(text, str) else text.blank


def decode(content: bytes, place: str, offset: int = 0) -> str:
    """UTF-8 to text.

    Args:
        content: The bytes.
        place: What messages call them.
        offset: Where they begin in their file.

    Raises:
        InputError: They are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, place, offset) from error


def cut(text: Text, fraction: float) -> tuple[Text, Text]:
    """Cuts off about the last `fraction`, from the next line (or else word) after the exact place.

    Raises:
        InputError: A part would be empty.
    """
    length = sum(len(block) for block in blocks(text))
    place = min(int(length * (1 - fraction)), length - 1)
    at = _line_or_word(text, place, place + (length - place) // 2)
    if isinstance(text, str):
        parts: tuple[Text, Text] = text[:at], text[at:]
    else:
        middle = text.start + _bytes_of(text, at)
        parts = scan(text.path, text.start, middle), scan(text.path, middle, text.stop)
    if any(is_blank(part) for part in parts):
        raise InputError(
            f"the only document has {length} characters, too few to cut off"
            f" validation_fraction {fraction}; use 0 or more text"
        )
    return parts


def _line_or_word(text: Text, start: int, end: int) -> int:
    """After the first line end from character `start` to `end`, or else space, or else `start`."""
    begin, space = 0, -1
    for block in blocks(text):
        inside = max(start - begin, 0), max(end - begin, 0)
        newline = block.find("\n", *inside)
        if newline >= 0:
            return begin + newline + 1
        if space < 0 and (found := block.find(" ", *inside)) >= 0:
            space = begin + found
        begin += len(block)
    return space + 1 if space >= 0 else start


def _bytes_of(text: LongText, characters: int) -> int:
    """Bytes of the text's first characters."""
    length = 0
    for block in blocks(text):
        length += len(block[:characters].encode())
        characters = max(characters - len(block), 0)
    return length


def _decoded(path: Path, start: int, stop: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            content = file.read(min(BLOCK, stop - start))
            if not content:
                raise InputError(f"{path} has become shorter than {stop} bytes while it was read")
            held = len(decoder.getstate()[0])
            try:
                block = decoder.decode(content, final=start + len(content) >= stop)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, str(path), start - held) from error
            start += len(content)
            if block:
                yield block


def _not_utf8(error: UnicodeDecodeError, place: str, offset: int) -> InputError:
    found = error.object[error.start]
    return InputError(f"{place}: not UTF-8 at byte {offset + error.start} (found {found:#04x})")
