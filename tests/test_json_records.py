"""JSON files that anybody may have written or damaged."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropepp.errors import InputError
from ropepp.records import as_record, read_bytes, read_json, read_record, write_record


@dataclass(frozen=True)
class Facts:
    count: int
    name: str | None
    shares: list[float]
    parts: dict[str, int]


FACTS = Facts(3, "é", [0.1, 1e-7], {"a": 5})
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def outcome(read: Callable[[], Facts]) -> tuple[Facts | None, str]:
    """What is read, or the refusal."""
    try:
        return read(), ""
    except InputError as error:
        return None, str(error)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", FACTS)
    assert read_record(tmp_path / "a.json", Facts) == FACTS


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_record(file, FACTS)
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        found, message = outcome(lambda: read_record(file, Facts))
        assert found in (None, FACTS)  # 1E-07 is 1e-07
        assert found or str(file) in message
        assert "\n" not in message


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.fixed_dictionaries(dict.fromkeys(vars(FACTS), plain)) | plain)
def test_other_values_are_refused_in_a_line(values: Any, tmp_path: Path) -> None:
    found, message = outcome(lambda: as_record(values, Facts, "here"))
    assert found or message.startswith("here")
    assert len(message) < 400
    if found:
        assert 0 <= found.count < 1 << 63
        assert all(abs(share) < 1e300 for share in found.shares)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1_000_000,
        b'{"count": ' + b"9" * 1_000_000 + b"}",
        b'{"a":' * 200_000,
        b"\xff\xfe",
        b"NaN",
        b"",
        b'{"count": 1e999, "name": null, "shares": [], "parts": {}}',
        b'{"count": true, "name": null, "shares": [NaN], "parts": {}}',
        b'{"count": -1, "name": 5, "shares": {}, "parts": []}',
        b'{"count": 1, "count": 1, "name": null, "shares": [], "parts": {}}',
        b"{" + b",".join(b'"%d": 0' % (i % 199_999) for i in range(200_000)) + b"}",
    ],
)
def test_hostile_files_are_refused_at_once(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_record(file, Facts)
    assert time.monotonic() - begin < 5
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(file))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(InputError, match="nothing is missing"):
        read_json(tmp_path / "nothing")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="large has more than 1000 bytes"):
        read_bytes(tmp_path / "large", 1000)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        read_json(tmp_path / "loop")
    assert json.loads("1") == 1
