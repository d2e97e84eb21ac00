"""Small sweeps for all tests in this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.sweep_runs import Sweeps


@pytest.fixture
def sweeps(tmp_path: Path, corpus: Path) -> Iterator[Sweeps]:
    made = Sweeps(tmp_path, corpus)
    yield made
    for driver in made.drivers:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that drivers in this process would have reported on."""
    folders: list[Path] = []
    monkeypatch.setattr("ropepp.commands.sweep._write_report", folders.append)
    return folders


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers in this process look around more often."""
    monkeypatch.setattr("ropepp.runs.process.POLL", 0.02)
