from collections.abc import Callable
from pathlib import Path

import pytest
from raw_text import TEXTS, json_lines, write_folder, write_zst

from ropepp.data.corpus import Skipped
from ropepp.data.sources import find_source, read_texts
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


@pytest.mark.parametrize("write", [write_zst, write_folder])
def test_progress_is_in_bytes_on_disk(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = find_source(write(tmp_path / "a.jsonl.zst"))
    seen: list[int] = []
    list(read_texts(source, "text", "skip", Skipped(), seen.append))
    assert sum(seen) == source.size > 0
