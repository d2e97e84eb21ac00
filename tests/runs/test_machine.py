"""What a result says of where it comes from."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ropepp.runs import machine


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_tells_of_changed_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "ropepp"
    (package / "runs").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "runs" / "machine.py"
    shutil.copyfile(machine.__file__, file)
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine.commit() is None  # no checkout
    git(tmp_path, "init", "--quiet")
    assert machine.commit() is None  # a checkout that the package is no part of
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    head = git(tmp_path, "rev-parse", "--short=10", "HEAD")
    (tmp_path / "results.jsonl").write_text("{}")
    assert machine.commit() == head
    (package / "new.py").touch()
    assert machine.commit() == f"{head}+"
