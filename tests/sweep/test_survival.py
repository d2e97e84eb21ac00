"""Sweeps of the real fit: killed at any time, they come to the same results."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.fit_runs import curve
from helpers.sweep_runs import Sweeps, finish, is_alive, wait_until
from ropepp.runs import process as run_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    """Four runs that nothing happens to, and their report."""
    made = Sweeps(tmp_path_factory.mktemp("undisturbed"), corpus)
    real(made)
    made.run()
    return made


def real(sweeps: Sweeps, **changes: Any) -> None:
    steps = {"trainer.max_steps": 60, "checkpoint.every_n_steps": 10}
    sweeps.write(real=True, seeds=[0, 1], set=steps, **changes)


def prompts(sweeps: Sweeps, run: str) -> int:
    """How often fit was started for a run."""
    log = (sweeps.directory(run) / "fit.log").read_text()
    return sum(line.startswith("$ ") for line in log.splitlines())


def test_a_short_sweep_ends_in_a_report(undisturbed: Sweeps) -> None:
    folder = undisturbed.logs / "try"
    assert len(undisturbed.finished()) == 4
    text = (folder / "report.md").read_text()
    assert "rope" in text
    assert "ec" in text
    assert list(folder.rglob("*tfevents*"))


@pytest.mark.extra
def test_killed_drivers_and_runs_change_no_result(
    undisturbed: Sweeps,
    sweeps: Sweeps,
) -> None:
    """The driver is killed in the third run, which goes on and is adopted; then driver and run are
    killed in the fourth, which goes on from its checkpoint."""
    real(sweeps)
    order = [f"{variant}/seed-{seed}" for seed in range(2) for variant in ("rope", "ec")]

    def reaches(run: str, step: int) -> bool:
        file = sweeps.directory(run) / "metrics.jsonl"
        return file.exists() and file.read_text().count("train/loss") >= step

    driver = sweeps.drive()
    wait_until(lambda: reaches(order[2], 20))
    driver.kill()
    driver.communicate()
    driver = sweeps.drive()
    wait_until(lambda: reaches(order[3], 20))
    driver.kill()
    driver.communicate()
    for pid in list(run_process.writers(sweeps.directory(order[3]) / "fit.log")):
        os.kill(pid, signal.SIGKILL)
    out = finish(sweeps.drive())
    assert f"{order[3]} goes on from step" in out
    assert [prompts(sweeps, run) for run in order] == [1, 1, 1, 2]
    assert sweeps.finished() == undisturbed.finished() == sorted(order)
    for run in order:
        here, there = sweeps.directory(run), undisturbed.directory(run)
        assert curve(here) == curve(there)
        results = [json.loads((d / "result.json").read_text()) for d in (here, there)]
        assert results[0]["evaluation"] == results[1]["evaluation"]


def test_a_run_that_diverges_leaves_the_others(sweeps: Sweeps, reported: list[Path]) -> None:
    position = {"class_path": "RoPE"}
    diverges = {"model.optimizer.lr": 1e30, "guard.stop_after": 2}
    variants = {"bad": {"model.position": position, **diverges},
                "good": {"model.position": position}}  # fmt: skip
    sweeps.write(real=True, variants=variants, seeds=[0])
    sweeps.run(code=1)
    assert sweeps.finished() == ["good/seed-0"]
    assert "exit code 76: 2 steps in a row" in sweeps.outcome("bad/seed-0")["reason"]


@pytest.mark.extra
def test_two_sharded_processes(sweeps: Sweeps) -> None:
    """They end when their driver is asked to, and go on."""
    sharded = {"trainer.strategy": "fsdp2", "trainer.devices": 2, "data.micro_batch_size": 2}
    rope = {"rope": {"model.position": {"class_path": "RoPE"}}}
    sweeps.write(real=True, variants=rope, seeds=[0], set={**sharded, "trainer.max_steps": 60})
    driver = sweeps.drive(python=sys.executable)
    run = sweeps.directory("rope/seed-0")
    wait_until((run / "metrics.jsonl").exists)
    pids = list(run_process.writers(run / "fit.log"))
    assert len(pids) == 2
    driver.send_signal(signal.SIGTERM)
    finish(driver, 75)
    assert not any(map(is_alive, pids))
    assert sweeps.outcome("rope/seed-0")["state"] == "preempted"
    assert list((run / "checkpoints").glob("step-*/.metadata"))
    finish(sweeps.drive())
    result = json.loads((run / "result.json").read_text())
    assert (result["world_size"], result["steps"]) == (2, 60)
    steps = [line["step"] for line in curve(run) if "train/loss" in line]
    assert steps == list(range(1, 61))
