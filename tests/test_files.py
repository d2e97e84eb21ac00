"""Locks of files, and file systems that have none."""

import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ropepp.errors import InputError
from ropepp.files import (
    held,
    one_command,
    replacing_file,
    replacing_folder,
    require_free,
    require_results,
    resuming_folder,
    write_text,
)


def test_the_second_holder_is_told_the_first(tmp_path: Path) -> None:
    file = tmp_path / "run" / "lock"
    with held(file):
        with pytest.raises(InputError, match=r"run is in use by process \d+ on "), held(file):
            pass
        assert file.exists()
    assert not file.parent.exists()
    with held(file):
        (file.parent / "result").touch()
    assert [path.name for path in file.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_file_systems_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="no lock on"), held(tmp_path / "run" / "lock"):
        pass
    with pytest.warns(UserWarning, match="no lock on"), resuming_folder(tmp_path / "out") as work:
        (work / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_what_a_killed_command_has_made_may_be_made_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replacing_folder(target) as work:  # no command: nothing tells that it is unfinished
        (work / "a").touch()
    with pytest.raises(InputError, match="exists"), replacing_folder(target):
        pass
    with one_command():
        other = tmp_path / "other"
        with replacing_folder(other):
            pass
        require_free(other)  # as after a kill here
        with replacing_folder(other) as work:
            (work / "new").touch()
        assert [path.name for path in other.iterdir()] == ["new"]
        with replacing_file(tmp_path / "file") as file:
            file.write(b"x")
        require_free(tmp_path / "file")
    for made in (other, tmp_path / "file"):
        with pytest.raises(InputError, match="exists"):
            require_free(made)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other", "file"}


@pytest.mark.parametrize(("holds", "is_one"), [("shards", "a corpus"), ("config.json", "a model")])
def test_results_are_not_put_among_others(holds: str, is_one: str, tmp_path: Path) -> None:
    require_results(tmp_path)
    (tmp_path / holds).mkdir()
    with pytest.raises(InputError, match=f"is {is_one}; results go to another folder"):
        require_results(tmp_path)


def test_many_write_one_file(tmp_path: Path) -> None:
    """The last one wins, each is whole, and nothing is left beside it."""
    texts = [str(number) * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a.txt", text), texts * 20))
    assert (tmp_path / "a.txt").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
