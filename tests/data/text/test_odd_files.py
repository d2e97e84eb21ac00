"""Which files of a folder are read, and how text is written in them."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.raw_text import read_texts
from ropepp.data.prepare.prepare import prepare
from ropepp.data.text import documents
from ropepp.data.text.readers import Skipped, read_column, read_text
from ropepp.data.text.sources import find_source
from ropepp.errors import InputError

BOM = b"\xef\xbb\xbf"
SPECIAL = [
    "\u2028",
    "\u2029",
    "\u0085",
    "\x0c",
    "\x0b",
    "\x1c",
    "\r",
    "\r\n",
    "\n",
    "\ufeff",
    "a é",
]
any_text = st.lists(st.sampled_from(SPECIAL) | st.text(max_size=5), max_size=8).map("".join)
in_one_folder = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(source: Path) -> list[str]:
    return list(read_texts(find_source(str(source)), "text", "fail", Skipped()))


@in_one_folder
@given(
    texts=st.lists(any_text, max_size=4),
    mark=st.sampled_from([b"", BOM]),
    end=st.sampled_from(["\n", "\r\n"]),
    escaped=st.booleans(),
)
def test_lines_hold_what_was_written(
    texts: list[str], mark: bytes, end: str, escaped: bool, tmp_path: Path
) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=escaped) + end for text in texts)
    file = tmp_path / "a.jsonl"
    file.write_bytes(mark + "".join(lines).encode())
    assert read(file) == [text for text in texts if text.strip()]
    assert read_column(file, "text") == texts


@in_one_folder
@given(text=any_text, mark=st.sampled_from([b"", BOM]), in_memory=st.booleans())
def test_a_text_is_as_it_is(text: str, mark: bytes, in_memory: bool, tmp_path: Path) -> None:
    if not mark:
        text = text.lstrip("\ufeff")
    file = tmp_path / "a.txt"
    file.write_bytes(mark + text.encode())
    assert read_text(file) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropepp.data.text.readers.IN_MEMORY", 1 << 20 if in_memory else 0)
        source = find_source(str(file))
        found = [
            "".join(documents.blocks(t)) for t in read_texts(source, "text", "fail", Skipped())
        ]
    assert found == ([text] if text.strip() else [])


@pytest.mark.parametrize(
    "line", [b"[]", b"{", b'{"text": null}', b'{"text": "\\udc00"}', b'"\xe9"']
)
def test_a_later_line_is_named(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\r\n\n' + line + b"\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 3"):
        read_column(file, "text")


def test_what_a_folder_holds_is_read_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{"text": "some words"}\n'
    folder, other = tmp_path / "folder", tmp_path / "other"
    for name in (
        *("a.jsonl", "B.JSONL", "c/d.Txt", "e.json", "f.json.gz", "README.md"),
        *("._a.jsonl", ".ipynb_checkpoints/a.jsonl", "c/.hidden/x.txt"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(line)
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "g.jsonl").write_text(line)
    (folder / "link").symlink_to(other)
    (folder / "again").symlink_to(folder / "c")
    (other / "up").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(folder / "nothing")
    source = find_source(str(folder))
    labels = [item.label for item in source.inputs]
    assert labels == ["B.JSONL", "a.jsonl", "c/d.Txt", "link/deep/g.jsonl"]
    told = capsys.readouterr().err
    for words in (
        "4 read: B.JSONL, a.jsonl, c/d.Txt, link/deep/g.jsonl",
        "3 not read, of other kinds: README.md, e.json, f.json.gz",
        "3 not read, hidden: ._a.jsonl, .ipynb_checkpoints, c/.hidden",
        "2 not read, links to folders that are read: again, link/up",
        "1 not read, no files or broken links: gone.jsonl",
    ):
        assert f"{folder}: {words}" in told
    assert read(folder) == ["some words", "some words", line, "some words"]


def test_a_folder_of_files_that_are_read_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert len(find_source(str(tmp_path)).inputs) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9.txt", b"caf\xe9.parquet"])
def test_names_that_are_no_utf8_are_read(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    file = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    rows = [{"text": f"words of document {number}"} for number in range(5)]
    if file.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        with file.open("wb") as out:
            parquet.write_table(arrow.Table.from_pylist(rows), out)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"bad": 1}\n')
    out = tmp_path / "out"
    prepare(str(folder), str(out), "bytes", validation_fraction=0, on_bad_line="skip")
    meta = json.loads((out / "train" / "meta.json").read_text())
    assert meta["documents"] == (1 if file.suffix == ".txt" else 5)
