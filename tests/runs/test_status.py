"""The table of a sweep's runs, from files that are whole, torn or missing."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.sweep_files import write_plan, write_spec
from ropepp.commands.sweep import main
from ropepp.errors import InputError
from ropepp.runs.records import RunSpec, SweepPlan
from ropepp.runs.status import RunProgress, duration, is_locked, progress_of, show, status, table

STATES = ("waiting", "running", "finished", "failed", "preempted", "pruned", "killed")


def begun(directory: Path, steps: int, last: int = 40) -> None:
    """What ``fit`` has written after some steps of 256 tokens at 512 a second, the last line not
    yet complete."""
    trainer = {"accelerator": "cpu", "max_steps": last}
    lines = "\n".join(f"  {key}: {value}" for key, value in trainer.items())
    (directory / "config.yaml").write_text(f"experiment: try\ntrainer:\n{lines}\nseed: 0\n")
    (directory / "fit.log").write_text("$ fit\n")
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            values: dict[str, Any] = {"step": step, "train/loss": 5 - step / 100}
            values |= {"train/tokens": 256.0 * step, "utilisation/tokens_per_second": 512.0}
            file.write(json.dumps(values) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "validation/loss": 6 - step / 100}) + "\n")
        file.write('{"step": 99, "train/lo')


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """A sweep with a run in each state; that of "running" is locked by this process."""
    write_plan(tmp_path, SweepPlan("try", "", "waiting", variants=list(STATES)))
    for state in STATES:
        spec = RunSpec(state, 0, {})
        directory = tmp_path / spec.run
        write_spec(directory, spec)
        if state != "waiting":
            begun(directory, 25)
        if state in ("failed", "preempted", "pruned"):
            outcome = {"state": state, "reason": "exit code 1: error: no"}
            (directory / "outcome.json").write_text(json.dumps(outcome))
    (tmp_path / "finished/seed-0/result.json").write_text('{"validation_loss": 4.5, "steps": 25}')
    with (tmp_path / "running/seed-0/fit.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield tmp_path


def test_states(folder: Path) -> None:
    runs = {run.name.split("/")[0]: run for run in status(folder)}
    assert list(runs) == list(STATES)
    assert runs["waiting"] == RunProgress("waiting/seed-0", "waiting")
    assert {name: run.state for name, run in runs.items()} == {
        **{state: state for state in STATES}, "killed": "preempted"
    }  # fmt: skip
    running = runs["running"]
    assert (running.step, running.max_steps) == (25, 40)
    assert (running.train_loss, running.validation_loss) == (4.75, 5.8)
    assert running.seconds_left == pytest.approx(15 * 256 / 512)
    assert runs["finished"].validation_loss == 4.5
    assert runs["failed"].reason == "exit code 1: error: no"
    assert all(run.seconds_left is None for name, run in runs.items() if name != "running")


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "train", "loss", "validation", "left"]
    assert lines[1].split() == ["waiting/seed-0", "waiting"]
    assert lines[2].split()[1:] == ["running", "25", "/", "40", "4.7500", "5.8000", "8", "s"]
    assert lines[-2] == "failed/seed-0 failed: exit code 1: error: no"
    counts = "1 finished, 1 running, 1 waiting, 2 preempted, 1 failed, 1 pruned"
    assert lines[-1] == f"{folder}: {counts}"


def test_torn_files(folder: Path) -> None:
    directory = folder / "running/seed-0"
    (directory / "result.json.tmp").write_text("{")
    (directory / "outcome.json").write_text("{")
    (directory / "metrics.jsonl").write_bytes(b"\xff{\n" * 20000)
    found = progress_of(directory, "running/seed-0")
    assert (found.state, found.step, found.train_loss) == ("running", 0, None)
    (directory / "metrics.jsonl").unlink()
    (directory / "config.yaml").unlink()
    assert progress_of(directory, "a") == RunProgress("a", "running")


def test_long_logs_are_read_from_their_end(folder: Path) -> None:
    begun(folder / "running/seed-0", 5000, 10_000)
    found = progress_of(folder / "running/seed-0", "running/seed-0")
    assert (found.step, found.max_steps, found.validation_loss) == (5000, 10_000, -44.0)


def test_locks(folder: Path) -> None:
    log = folder / "running/seed-0/fit.log"
    assert is_locked(log)
    assert is_locked(log)  # looking does not take it
    assert not is_locked(folder / "failed/seed-0/fit.log")
    assert not is_locked(folder / "no-such-file")


def test_watching_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in ("waiting", "running", "preempted", "killed"):
        (folder / state / "seed-0/result.json").write_text('{"validation_loss": 4.0}')
    show(folder, watch=True)
    assert capsys.readouterr().out.count("validation") == 1


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no sweep's folder: sweep.json is missing"):
        main(["status", str(tmp_path)])
    with pytest.raises(InputError, match="neither a sweep's YAML nor"):
        main(["status", str(tmp_path / "no.yaml")])
    assert table(tmp_path, []).endswith("no runs")


def test_durations() -> None:
    found = [duration(seconds) for seconds in (0.4, 89, 90, 5399, 5400, 90_000)]
    assert found == ["0 s", "89 s", "2 min", "90 min", "1 h 30 min", "25 h 0 min"]
