"""One or two faults of each kind, by scripts/faults: nothing is lost, silent, executed or hangs."""

import json
from pathlib import Path

import pytest

import faults
import faults_child
import faults_parts
from faults_kills import lose, stamp
from ropepp.errors import Diverged, Preempted

SHORT = (
    "kills: fit, at a call",
    "kills: prepare, power lost",
    "kills: export, at a call",
    "damage: checkpoint, one file",
    "damage: run folder",
    "signals: fit, TERM",
    "disks: a file, or a folder, in the way",
    "hostile: pickles in checkpoints",
    "hostile: classes and tags in YAML",
    "hostile: paths that lead elsewhere",
    "two: fit, twice",
    "two: export, twice",
)


@pytest.mark.slow
def test_a_short_form_of_the_table(tmp_path: Path) -> None:
    page, work = tmp_path / "faults.md", tmp_path / "work"
    argv = ["--only", *SHORT, "--each", "1", "--jobs", "2", "--seconds", "900"]
    code = faults.main([*argv, "--work", str(work), "--out", str(page)])
    content = json.loads(page.with_suffix(".json").read_text())
    assert content["failed"] == []
    assert code == 0
    tried = {f"{row['kind']}: {row['fault']}": row for row in content["faults"] if row["tries"]}
    assert len(tried) >= len(SHORT)
    assert all(row["detected"] + row["recovered"] >= row["tries"] for row in tried.values())
    assert "## What did not go well" not in page.read_text()
    # The same command has nothing left to do, and says the same.
    assert faults.main([*argv, "--work", str(work), "--out", str(page)]) == 0
    again = json.loads(page.with_suffix(".json").read_text())
    assert again["faults"] == content["faults"]


def test_what_was_not_synced_is_lost(tmp_path: Path) -> None:
    for name in ("old", "grown", "new", "synced"):
        (tmp_path / name).write_bytes(b"12345678")
    before = {tmp_path / name: stamp(tmp_path / name) for name in ("old", "grown")}
    (tmp_path / "grown").write_bytes(b"1234567890")
    journal = tmp_path.parent / "journal"
    status = (tmp_path / "synced").stat()
    journal.write_text(f"{status.st_dev} {status.st_ino} 4\n")
    assert sorted(lose(tmp_path, journal, before)) == ["grown", "new", "synced"]
    assert [(tmp_path / n).stat().st_size for n in ("old", "grown", "new", "synced")] == [
        8,
        8,
        0,
        4,
    ]


def test_calls_are_counted_and_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = faults_child.Calls(0, "ENOSPC", None)
    monkeypatch.setattr(faults_child, "CALLS", calls)
    with calls.open(tmp_path / "a", "w") as file:
        file.write("x")
        assert calls.number == 0  # it is in the buffer
        file.flush()
        assert calls.number == 1
        calls.at = 2
        file.write("y")
        with pytest.raises(OSError, match="No space left"):
            file.flush()
        calls.at = 0
    assert (tmp_path / "a").read_text() == "xy"
    with calls.open(tmp_path.parent / "elsewhere", "w") as file:
        file.write("x")
    assert calls.number == 3


def test_codes_are_those_of_the_errors() -> None:
    assert {Preempted.code, Diverged.code} <= {*faults_parts.CODES}
