"""The script that fetches benchmark files."""

import runpy
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from helpers import evaluated
from ropepp.eval.local_data import TASKS


def test_fetched_files_are_what_the_command_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        if path == "aps/super_glue":
            rng = Random(0)
            return [evaluated.ROWS["wic"](rng) for _ in range(3)]
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["fetch", str(tmp_path / "data"), "wic", "piqa"]
    monkeypatch.setattr(sys, "argv", arguments)
    script = str(Path(__file__).parents[2] / "scripts" / "fetch_eval_data.py")
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(script, run_name="__main__")
    assert asked == [("aps/super_glue", "wic", "validation"), ("baber/piqa", None, "validation")]
    assert "baber/piqa cannot be fetched: no network" in capsys.readouterr().err
    assert len(TASKS["wic"].rows(tmp_path / "data")) == 3
    monkeypatch.setattr(sys, "argv", arguments[:3])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script, run_name="__main__")
    assert "is there" in capsys.readouterr().out
