"""A document's text: in memory, or a file too long for it that is read in parts."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ropepp.errors import InputError

BOM = "\ufeff"  # at a file's beginning: a mark of editors, no text
BLOCK = 1 << 18  # bytes or characters read at a time
IN_MEMORY = 16 << 20  # bytes of a .txt file up to which it is read whole


@dataclass(frozen=True)
class LongText:
    """Bytes `start` to `stop` of a UTF-8 file."""

    path: Path
    start: int
    stop: int


Text = str | LongText


def scan(path: Path) -> LongText:
    """A file that was read to its end; an `InputError` if it is not UTF-8."""
    with path.open("rb") as file:
        start = len(BOM.encode()) if file.read(3) == BOM.encode() else 0
    found = LongText(path, start, path.stat().st_size)
    for _ in blocks(found):
        pass
    return found


def blocks(text: Text) -> Iterator[str]:
    """The text in parts of about `BLOCK` characters; an `InputError` if its file has changed."""
    if isinstance(text, str):
        yield from (text[at : at + BLOCK] for at in range(0, len(text), BLOCK))
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    path, at, stop = text.path, text.start, text.stop
    with path.open("rb") as file:
        file.seek(at)
        while at < stop:
            content = file.read(min(BLOCK, stop - at))
            if not content:
                raise InputError(f"{path} has become shorter than {stop} bytes while it was read")
            held = len(decoder.getstate()[0])
            try:
                block = decoder.decode(content, final=at + len(content) >= stop)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, str(path), at - held) from error
            at += len(content)
            if block:
                yield block


def text_sha256(text: Text) -> bytes:
    """sha256 of the text in UTF-8."""
    digest = hashlib.sha256()
    for block in blocks(text):
        digest.update(block.encode())
    return digest.digest()


def text_bytes(text: Text) -> int:
    """Number of bytes of the text in UTF-8."""
    return len(text.encode()) if isinstance(text, str) else text.stop - text.start


def is_blank(text: Text) -> bool:
    """Whether there is nothing but white space."""
    return all(block.isspace() for block in blocks(text))


def decode(content: bytes, place: str, offset: int = 0) -> str:
    """UTF-8 to text; messages name the place, and the byte from where the content begins in its
    file. Raises an `InputError` if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, place, offset) from error


def cut(text: Text, fraction: float) -> tuple[Text, Text]:
    """Cuts off about the last `fraction`, from the next line (or else word) after the exact place.
    Raises an `InputError` if a part would be empty."""
    length = sum(map(len, blocks(text)))
    place = min(int(length * (1 - fraction)), length - 1)
    at, offset = _line_or_word(text, place, place + (length - place) // 2)
    if isinstance(text, str):
        parts: tuple[Text, Text] = text[:at], text[at:]
    else:
        middle = text.start + offset
        parts = replace(text, stop=middle), replace(text, start=middle)
    if any(is_blank(part) for part in parts):
        raise InputError(
            f"the only document has {length} characters, too few to cut off"
            f" validation_fraction {fraction}; use 0 or more text"
        )
    return parts


def _line_or_word(text: Text, start: int, end: int) -> tuple[int, int]:
    """After the first line end from character `start` to `end`, or else space, or else `start`;
    the place in characters and in bytes."""
    characters = offset = 0
    found: dict[str, tuple[int, int]] = {}  # the first place after each mark
    for block in blocks(text):
        inside = max(start - characters, 0), max(end - characters, 0)
        for mark in ("\n", " ", ""):
            at = block.find(mark, *inside)
            if at >= 0 and mark not in found:
                head = block[: at + len(mark)]
                found[mark] = characters + len(head), offset + len(head.encode())
        characters += len(block)
        offset += len(block.encode())
        if "\n" in found or characters >= end:
            break
    return found.get("\n") or found.get(" ") or found[""]  # the start lies inside the text


def _not_utf8(error: UnicodeDecodeError, place: str, offset: int) -> InputError:
    found = error.object[error.start]
    return InputError(f"{place}: not UTF-8 at byte {offset + error.start} (found {found:#04x})")
