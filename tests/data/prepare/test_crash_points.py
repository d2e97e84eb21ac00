"""A prepare that is killed before any of its calls to the file system, and then called again."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from helpers.corpora import run, snapshot
from helpers.raw_text import TEXTS, json_lines

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def killed_at(number: int, work: Callable[[], object], folder: Path) -> bool:
    """Forks a process that is killed before its call of this number that has to do with a folder;
    False if there are fewer calls."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls, fsync = 0, os.fsync

    def called(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event == "fsync" or (event in EVENTS and str(folder) in str(arguments)):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def synced(handle: int) -> None:
        called("fsync", ())
        fsync(handle)

    try:
        os.fsync = synced  # type: ignore[assignment]
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.addaudithook(called)
        work()
    finally:
        os._exit(0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(TEXTS[:20]))
    (folder / "b.jsonl").write_bytes(b"{\n" + json_lines(TEXTS[20:]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.extra)])
def test_the_same_command_ends_what_a_kill_has_begun(
    overwrite: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # takes long, and no power fails here
    expected, work = snapshot(run(source, tmp_path / "expected")), tmp_path / "work"
    old = snapshot(run(source, tmp_path / "old", min_tokens=47))
    for number in count(1):
        out = work / str(number) / "out"
        if overwrite:
            shutil.copytree(tmp_path / "old", out)
        again = partial(run, source, out, overwrite=overwrite)
        killed = killed_at(number, again, out.parent)
        if out.exists():  # whole, whichever it is
            assert snapshot(out) in ((old, expected) if overwrite else (expected,))
        again()
        assert snapshot(out) == expected
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out)
        if not killed:
            break
    assert number > 60


def test_all_is_on_the_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()  # inodes, which keep their numbers when they are renamed
    fsync, rename, unsynced, events = os.fsync, os.rename, [], []

    def sync(handle: int) -> None:
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)
        events.append(os.readlink(f"/proc/self/fd/{handle}"))

    def give_name(old: Path, new: Path) -> None:
        unsynced.extend(path for path in [old, *Path(old).rglob("*")] if _inode(path) not in synced)
        rename(old, new)
        events.append((str(old), str(new)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", give_name)
    out = run(source, tmp_path / "out")
    assert not unsynced
    renames = [at for at, event in enumerate(events) if isinstance(event, tuple)]
    assert len(renames) == 3  # two shards and the corpus
    assert all(events[at + 1] == str(Path(events[at][1]).parent) for at in renames)
    assert events[-2][1] == str(out)


def _inode(path: Path) -> int:
    return path.stat().st_ino
