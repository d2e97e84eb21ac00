import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from helpers.raw_text import TEXTS, json_lines, read_texts, write_folder, write_zst
from ropepp.data.text import documents as texts
from ropepp.data.text import readers
from ropepp.data.text.readers import Skipped
from ropepp.data.text.sources import find_source
from ropepp.errors import InputError

BAD_LINES = [
    (b'{"text": "a"', "line 2: malformed JSON (Expecting ',' delimiter at column 13)"),
    (b'{"txt": "a", "b": 1}', "line 2: no field 'text'; fields are b, txt"),
    (b'{"text": 3}', "line 2: field 'text' is int; allowed is a string"),
    (b'{"text": null}', "line 2: field 'text' is NoneType; allowed is a string"),
    (b'["text"]', "line 2: found list; allowed is one JSON object"),
    (b'{"text": "\xff"}', "line 2: not UTF-8 at byte 26 (found 0xff)"),
    (b'{"text": "\\ud800"}', "line 2: field 'text' has half a surrogate pair"),
    (b'{"text": ' + b"9" * 5000 + b"}", "line 2: unreadable JSON (Exceeds the limit"),
    (b"[" * 100_000, "line 2: unreadable JSON (maximum recursion depth"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "abc"}\n' + line + b"\n" + json_lines(TEXTS))
    with pytest.raises(InputError) as caught:
        list(read_texts(find_source(str(file)), "text", "fail", Skipped()))
    assert str(caught.value).startswith(f"{file}, {message}")
    assert str(caught.value).endswith("; or pass --on_bad_line skip")
    assert "\n" not in str(caught.value)


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    file, skipped = tmp_path / "a.jsonl", Skipped()
    bad = [line + b"\n" for line, _ in BAD_LINES]
    file.write_bytes(b"".join(bad) + json_lines(["", " \n", *TEXTS]))
    assert list(read_texts(find_source(str(file)), "text", "skip", skipped)) == TEXTS
    assert skipped == Skipped(bad_lines=len(bad), empty_documents=2)


@pytest.mark.parametrize("block", [7, 1 << 18])
def test_lines_beyond_the_limit_are_bad_and_take_no_memory(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 200)
    monkeypatch.setattr(readers, "BLOCK", block)
    file, skipped = tmp_path / "a.jsonl", Skipped()
    lines = json_lines(["x" * 179, "y" * 180, *TEXTS, "z" * 1000])
    file.write_bytes(lines)
    found = list(read_texts(find_source(str(file)), "text", "skip", skipped))
    assert found == ["x" * 179, *TEXTS]
    reason = "bytes; allowed are up to 200 in a line (more fits into a .txt file)"
    assert skipped.reports == [f"a.jsonl\t2\t201 {reason}", f"a.jsonl\t43\t1021 {reason}"]
    # Without a line end at the end, and with what follows it.
    for content, number in ((lines[:-1], 43), (lines + b"{}", 44)):
        file.write_bytes(content)
        skipped = Skipped()
        list(read_texts(find_source(str(file)), "text", "skip", skipped))
        assert skipped.reports[-1].startswith(f"a.jsonl\t{number}\t")


def test_text_files_that_are_not_utf8_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, content in enumerate((b"good", b"caf\xe9", "über".encode(), b"caf\xc3")):
        (tmp_path / f"{number}.txt").write_bytes(content)
    reports = [
        "1.txt\t-\tnot UTF-8 at byte 3 (found 0xe9)",
        "3.txt\t-\tnot UTF-8 at byte 3 (found 0xc3)",
    ]
    for in_memory, block in ((100, 100), (0, 3), (0, 4), (0, 1)):
        monkeypatch.setattr(readers, "IN_MEMORY", in_memory)
        monkeypatch.setattr(texts, "BLOCK", block)
        skipped = Skipped()
        found = read_texts(find_source(str(tmp_path)), "text", "skip", skipped)
        assert ["".join(texts.blocks(text)) for text in found] == ["good", "über"]
        assert skipped.reports == reports


def test_many_small_frames_and_little_that_becomes_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed data that grows thousands of times comes out in bounded parts."""
    monkeypatch.setattr(readers, "COMPRESSED", 64)
    content = json_lines([" " * 5_000_000 + "end"])
    for name, packed in (
        ("a.jsonl.zst", zstandard.compress(content)),
        ("a.jsonl.gz", gzip.compress(content)),
    ):
        path = tmp_path / name
        path.write_bytes(packed)
        largest = max(map(len, readers._decompress(path, iter([packed]))))
        assert largest <= 64 / 4 * (128 << 10)
        assert b"".join(readers._decompress(path, iter([packed]))) == content
        frames = packed * 3
        each = (frames[at : at + 5] for at in range(0, len(frames), 5))
        assert sum(map(len, readers._decompress(path, each))) == 3 * len(content)


@pytest.mark.parametrize("write", [write_zst, write_folder])
def test_progress_is_in_bytes_on_disk(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = find_source(write(tmp_path / "a.jsonl.zst"))
    seen: list[int] = []
    list(read_texts(source, "text", "skip", Skipped(), seen.append))
    assert sum(seen) == sum(item.size for item in source.inputs) > 0
