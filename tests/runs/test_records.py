"""One damaged file of one run is named and stops nothing; the run counts as still to be made."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers.sweep_files import result, write_sweep
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.records import Damaged
from ropepp.runs.records import (
    RunSpec,
    entry,
    load_json,
    read_lines,
    read_plan,
    read_runs,
)
from ropepp.runs.status import state_of, status
from ropepp.sweep.boards import write_boards
from ropepp.sweep.report import write_report
from ropepp.sweep.results import load

LOSSES = {"rope": {0: 5.0, 1: 5.1, 2: 5.2}, "ec": {0: 4.9, 1: 5.0, 2: 5.1}}
DAMAGE = (b"", b"{", b"\xff\xfe\x00", b"[]", b"5", b"null", b"[" * 100_000, b'{"a": 1}', b"\0" * 99)
RESULTS = [
    {**result("rope", 1, 5.0), **change}
    for change in (
        {"validation_loss": "low"},
        {"steps": "300"},
        {"evaluation": []},
        {"evaluation": {"validation/loss": [1]}},
        {"finished": "yesterday"},
        {"loss_by_position": {"": {"position": [1], "loss": []}}},
    )
]
TRIALS: list[dict[str, Any]] = [
    {"variant": "rope", "seed": "1", "overrides": {}, "settings": {}},
    {"variant": "rope", "seed": 1, "overrides": [], "settings": {}},
    {"variant": "../../rope", "seed": 1, "overrides": {}, "settings": {}},
    {"variant": "ec", "seed": 0, "overrides": {}, "settings": {}},
    {"variant": "rope", "seed": 1, "overrides": {}, "colour": 1},
]
PLANS = [{"name": "heads", "question": "", "baseline": "rope", "variants": [1]}]


def encoded(contents: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(content).encode() for content in contents]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "heads", LOSSES)


def test_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = folder / "rope/seed-1"
    for content in (*DAMAGE, *encoded(RESULTS)):
        (directory / "result.json").write_bytes(content)
        with pytest.warns(UserWarning, match=r"rope/seed-1/result.json is damaged: .* as missing"):
            found = {run.name: run for run in status(folder)}
        assert found["rope/seed-1"].state == "waiting"
        assert found["rope/seed-1"].reason == "result.json is damaged: it will be repeated"
        assert [run.spec.run for run in load(folder).unfinished] == ["rope/seed-1"]
    assert main(["results", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "rope/seed-1/result.json is damaged" in shown.err
    assert shown.out.count("/seed-") == 5
    (directory / "result.json").unlink()
    (directory / "result.json").mkdir()
    assert state_of(directory) == "waiting"


def test_trials(folder: Path) -> None:
    file = folder / "rope/seed-1/trial.json"
    names = [run.spec.run for run in read_runs(folder)]
    for content in (*DAMAGE, *encoded(TRIALS)):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"rope/seed-1/trial.json is damaged"):
            runs = read_runs(folder)
        assert [run.spec.run for run in runs] == names
        assert runs[1].spec == RunSpec("rope", 1, {})
        assert runs[1].result["validation_loss"] == 5.1
    shutil.copytree(folder / "rope/seed-0", folder / "copy/seed-0")  # by hand
    with pytest.warns(UserWarning, match=r"copy/seed-0/trial.json .* is of rope/seed-0"):
        assert [run.spec.run for run in read_runs(folder)] == names


def test_plans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (*DAMAGE, *encoded(PLANS)):
        (folder / "sweep.json").write_bytes(content)
        with pytest.raises(Damaged, match=r"sweep.json is damaged"):
            read_plan(folder)
        with pytest.warns(UserWarning, match=r"sweep.json is damaged: .* init` writes it anew"):
            assert len(status(folder)) == 6
    assert main(["sweep", "report", str(folder)]) == 2
    assert f"{folder}/sweep.json is damaged" in capsys.readouterr().err


def test_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("nan")}]
    bad = [b"\xff", b"[1]", b"3", b'{"train/loss": 1}', b'{"step": "2"}', b'{"step": -1}', b""]
    bad += [b'{"step": 1e3}', b'{"step": true}', b'{"step": 1' + b"0" * 30 + b"}", b"[" * 9999]
    assert [entry(line) for line in bad] == [None] * len(bad)
    assert entry(b'{"step": 1, "a": [], "b": null, "c": 2}') == {"step": 1, "c": 2}
    lines = [*bad[:5], *(json.dumps(one).encode() for one in good), *bad[5:]]
    file.write_bytes(b"\n".join(lines) + b'\n{"step": 3, "train/loss": 1}')
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl is damaged: 11 lines .*, line 1 the first"
    ):
        found = list(read_lines(file))
    assert repr(found) == repr(good)
    assert list(read_lines(tmp_path / "none")) == []


def test_a_report_of_what_is_whole(folder: Path) -> None:
    """Every file of one run is damaged at once."""
    directory = folder / "ec/seed-1"
    for name in ("result.json", "trial.json", "outcome.json", "lock", "config.yaml", "fit.log"):
        (directory / name).write_bytes(b"\xff{")
    (directory / "metrics.jsonl").write_bytes(b"\xff\n[]\n" + b"{}\n" * 3)
    (folder / "ec/seed-2/metrics.jsonl").write_bytes(b"[]\n")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        write_report(folder)
        write_boards(folder)
        assert [run.state for run in status(folder)].count("finished") == 5
    said = "\n".join(str(one.message) for one in warned)
    for name in ("result.json", "trial.json", "outcome.json", "metrics.jsonl"):
        assert f"ec/seed-1/{name} is damaged" in said
    report = (folder / "report.md").read_text()
    assert "Not finished, or failed, and left out: ec/seed-1." in report


def test_a_result_without_finite_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """null in the file, and words: diverged, not unmeasured."""
    content = {**result("ec", 1, 1.0), "validation_loss": None, "validation_perplexity": None}
    content |= {"evaluation": {"validation/loss": None}, "diverged": "validation/loss is nan"}
    content["loss_by_position"] = {"": {"position": [0, 1], "loss": [None, 2], "count": [1, 1]}}
    (folder / "ec/seed-1/result.json").write_text(json.dumps(content))
    write_report(folder)
    write_boards(folder)
    assert "Diverged (no finite value), and left out" in (folder / "report.md").read_text()
    assert main(["results", str(folder)]) == 0
    assert capsys.readouterr().out.count("| diverged | diverged |") == 1


def test_missing_and_unreadable(tmp_path: Path) -> None:
    assert load_json(tmp_path / "none.json") == {}
    with pytest.raises(InputError, match=r"is damaged: no file"):
        load_json(tmp_path)
