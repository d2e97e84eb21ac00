"""Files of raw text for the tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ropepp.data.text.documents import Text
from ropepp.data.text.readers import Reader
from ropepp.data.text.sources import Source

TEXTS = [f"Document {n}: it's short,\nbut it has two lines.\n" for n in range(40)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def write_jsonl(path: Path) -> str:
    path.write_bytes(b"\n" + json_lines(TEXTS).replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    return str(path)


def write_zst(path: Path) -> str:
    """Two frames one after another, as parallel compressors write."""
    halves = json_lines(TEXTS[:17]), json_lines(TEXTS[17:])
    path.write_bytes(b"".join(zstandard.compress(half) for half in halves))
    return str(path)


def write_folder(path: Path) -> str:
    """All kinds of files; names are chosen so that the order by path is the order of the texts."""
    (path / "b/deep").mkdir(parents=True)
    (path / "a.txt").write_bytes(TEXTS[0].encode())
    (path / "b/a.jsonl").write_bytes(json_lines(TEXTS[1:20]))
    (path / "b/deep/x.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS[20:39])))
    (path / "c.txt").write_bytes(TEXTS[39].encode())
    (path / "read.me").write_text("not this")
    return str(path)


def read_texts(source: Source, field: str, *how: Any) -> Iterator[Text]:
    """The documents of a source."""
    return Reader(field, *how).texts(source.inputs)
