"""Driving a sweep: everything runs once, whatever dies."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fit_runs import curve
from ropepp.errors import InputError
from ropepp.sweep import fits
from ropepp.sweep.cli import slots
from ropepp.sweep.fits import Fit
from ropepp.sweep.records import Trial, read_plan
from ropepp.sweep.spec import load
from ropepp.sweep.study import Point, open_sweep

RUNS = ["ec/seed-0", "ec/seed-1", "rope/seed-0", "rope/seed-1"]
SLOW = {"steps": 40, "pause": 0.05}
RANGE = {"model.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}}
Until = Callable[..., None]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def finish(driver: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == code, out
    return out


def test_everything_runs_once(
    sweeps: Any, reported: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.write()
    sweeps.run()
    assert sweeps.finished() == RUNS
    assert reported == [sweeps.logs / "try"]
    out = capsys.readouterr().out
    assert "[4/4] ec/seed-1 finished: validation_loss 1.0010 in" in out
    assert "rope/seed-0 started; output in" in out
    sweep = open_sweep(load(sweeps.folder / "sweep.yaml"))
    trials = sweep._study("try").get_trials()
    assert [(t.state.name, t.value) for t in trials] == [
        ("COMPLETE", v) for v in (1, 1, 1.001, 1.001)
    ]

    sweeps.run()  # nothing is left
    (sweeps.logs / "try" / "study.db").unlink()
    sweeps.run()
    assert sweeps.states() == ["COMPLETE"] * 4
    assert all(len(sweeps.starts(run)) == 1 for run in RUNS)


def test_a_crash_leaves_the_others(
    sweeps: Any, reported: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.write()
    sweeps.behave({"rope/seed-0": {"crash": 2}})
    sweeps.run(code=1)
    assert sweeps.finished() == ["ec/seed-0", "ec/seed-1", "rope/seed-1"]
    outcome = sweeps.outcome("rope/seed-0")
    assert (outcome["state"], outcome["reason"]) == ("failed", "exit code 1: ValueError: it broke")
    log = sweeps.directory("rope/seed-0") / "fit.log"
    failed = f"rope/seed-0 failed: exit code 1: ValueError: it broke; see {log}"
    assert failed in capsys.readouterr().out
    assert sweeps.states() == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert len(reported) == 1

    sweeps.behave({})
    sweeps.run(code=1)  # not tried again unless asked
    (sweeps.logs / "try" / "study.db").unlink()
    sweeps.run(code=1)
    assert len(sweeps.starts("rope/seed-0")) == 1
    sweeps.run("--retry-failed")
    assert sweeps.finished() == RUNS
    assert sweeps.states() == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [len(sweeps.starts(run)) for run in RUNS] == [1, 1, 2, 1]


def test_all_fail(sweeps: Any, reported: list[Path]) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"crash": 1}, "ec/seed-0": {"crash": 1}})
    sweeps.run(code=1)
    assert reported == []


def test_killed_runs_go_on_unless_they_come_no_further(sweeps: Any, reported: list[Path]) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"kill": 3}})  # its checkpoint is at step 2
    sweeps.run(code=1)
    assert len(sweeps.starts("rope/seed-0")) == 4
    reason = "killed by signal 9, 3 times without a new checkpoint"
    assert sweeps.outcome("rope/seed-0")["reason"] == reason
    assert sweeps.finished() == ["ec/seed-0"]


def test_a_preempted_run_goes_on(sweeps: Any, until: Until) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": SLOW})
    driver = sweeps.drive()
    metrics = sweeps.directory("rope/seed-0") / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4)
    os.kill(sweeps.starts("rope/seed-0")[0]["pid"], signal.SIGTERM)
    out = finish(driver)
    assert "asked to end; it can go on" in out
    assert "rope/seed-0 goes on from step" in out
    assert len(sweeps.starts("rope/seed-0")) == 2
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_a_driver_that_is_asked_to_end_takes_its_runs_along(
    sweeps: Any, reported: list[Path], until: Until
) -> None:
    sweeps.write()
    sweeps.behave(dict.fromkeys(RUNS, SLOW))
    driver = sweeps.drive("--jobs", "2")
    begun = ["rope/seed-0", "ec/seed-0"]
    until(lambda: all((sweeps.directory(run) / "metrics.jsonl").exists() for run in begun))
    driver.send_signal(signal.SIGTERM)
    assert "asked to end; the same command goes on" in finish(driver, 75)
    for run in begun:
        assert sweeps.outcome(run)["state"] == "preempted"
        assert not is_alive(sweeps.starts(run)[0]["pid"])
        assert list((sweeps.directory(run) / "checkpoints").iterdir())
    assert sweeps.finished() == []
    assert sweeps.states() == ["WAITING"] * 4
    sweeps.behave({})
    sweeps.run()
    assert sweeps.finished() == RUNS
    assert [len(sweeps.starts(run)) for run in RUNS] == [2, 1, 2, 1]


def test_what_does_not_end_is_killed_after_a_while(sweeps: Any, until: Until) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {**SLOW, "pause": 1, "stubborn": True, "helper": True}})
    driver = sweeps.drive("--grace", "1")
    until((sweeps.directory("rope/seed-0") / "metrics.jsonl").exists)
    log = sweeps.directory("rope/seed-0") / "fit.log"
    pids = list(fits.writers(log))
    assert len(pids) == 2  # one of them in a session of its own
    driver.send_signal(signal.SIGINT)
    began = time.monotonic()
    finish(driver, 75)
    assert time.monotonic() - began > 1
    assert not any(map(is_alive, pids))


def test_processes_that_a_run_leaves_behind_are_ended(
    sweeps: Any, reported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "LINGERING", 0.2)
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"helper": True}})
    sweeps.run()
    assert sweeps.finished() == ["ec/seed-0", "rope/seed-0"]
    assert not list(fits.writers(sweeps.directory("rope/seed-0") / "fit.log"))


def test_two_drivers_share_a_sweep(sweeps: Any) -> None:
    sweeps.write(seeds=[0, 1, 2])
    sweeps.behave({f"{v}/seed-{s}": {"pause": 0.3} for v in ("rope", "ec") for s in range(3)})
    drivers = [sweeps.drive("--jobs", "2") for _ in range(2)]
    outs = [finish(driver) for driver in drivers]
    assert len(sweeps.finished()) == 6
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())
    assert sweeps.states() == ["COMPLETE"] * 6
    assert all(" started" in out for out in outs)
    assert all("reported" in out for out in outs)


@pytest.mark.slow
def test_two_drivers_set_up_one_sweep(sweeps: Any) -> None:
    sweeps.write(seeds=[0])
    for out in [finish(driver) for driver in [sweeps.drive(init=False) for _ in range(2)]]:
        assert "Traceback" not in out
    assert sweeps.finished() == ["ec/seed-0", "rope/seed-0"]
    assert sweeps.states() == ["COMPLETE"] * 2


def test_orphans_are_adopted_and_not_run_twice(sweeps: Any, until: Until) -> None:
    sweeps.write()
    sweeps.behave({"rope/seed-0": SLOW, "ec/seed-0": SLOW})
    driver = sweeps.drive("--gpus", "3,5")
    until(lambda: all(sweeps.starts(run) for run in ("rope/seed-0", "ec/seed-0")))
    driver.kill()
    driver.communicate()
    pids = [sweeps.starts(run)[0]["pid"] for run in ("rope/seed-0", "ec/seed-0")]
    assert all(map(is_alive, pids))
    os.kill(pids[0], signal.SIGKILL)
    out = finish(sweeps.drive("--gpus", "3,5"))
    assert "ec/seed-0 goes on without its driver: adopted" in out
    assert sweeps.finished() == RUNS
    assert [len(sweeps.starts(run)) for run in RUNS] == [1, 1, 2, 1]
    # The adopted one still has its device.
    assert [start["gpu"] for start in sweeps.starts("rope/seed-0")] == ["3", "3"]
    assert sweeps.starts("ec/seed-0")[0]["gpu"] == "5"


def test_an_adopted_run_is_asked_to_end_too(sweeps: Any, until: Until) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {**SLOW, "steps": 4000}})
    driver = sweeps.drive()
    until((sweeps.directory("rope/seed-0") / "metrics.jsonl").exists)
    driver.kill()
    driver.communicate()
    driver = sweeps.drive()
    for line in driver.stdout:
        if "adopted" in line:
            break
    driver.send_signal(signal.SIGTERM)
    finish(driver, 75)
    assert not is_alive(sweeps.starts("rope/seed-0")[0]["pid"])
    assert sweeps.outcome("rope/seed-0")["state"] == "preempted"


def test_a_grid_that_has_grown_runs_what_is_new(sweeps: Any, reported: list[Path]) -> None:
    sweeps.write(seeds=[0])
    sweeps.run()
    variants = {"rope": {"model.position": {"class_path": "RoPE"}},
                "nope": {"model.position": {"class_path": "NoPE"}}}  # fmt: skip
    sweeps.write(seeds=[0, 1], variants=variants)
    sweeps.run()
    new = ["nope/seed-0", "nope/seed-1", "rope/seed-1"]
    assert sweeps.finished() == ["ec/seed-0", *new[:2], "rope/seed-0", new[2]]
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())
    assert read_plan(sweeps.logs / "try").variants == ["rope", "nope"]


def test_devices_are_handed_out_one_by_one(sweeps: Any, reported: list[Path]) -> None:
    sweeps.write()
    sweeps.behave({run: {"pause": 0.1} for run in RUNS})
    sweeps.run("--gpus", "3,5")
    spans: dict[str, list[tuple[float, float]]] = {}
    for run in RUNS:
        (start,) = sweeps.starts(run)
        ended = (sweeps.directory(run) / "result.json").stat().st_mtime
        spans.setdefault(start["gpu"], []).append((start["time"], ended))
    assert set(spans) == {"3", "5"}
    for own in spans.values():
        own.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(own))


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(None, None) == [None]
    assert slots(3, None) == [None] * 3
    assert slots(None, "0, 2") == ["0", "2"]
    assert slots(3, "0,2") == ["0", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert slots(None, "auto") == ["4", "6"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for bad in ("auto", "0,,1", ""):
        with pytest.raises(InputError, match=f"--gpus is {bad}"):
            slots(None, bad)


def test_limit(sweeps: Any, reported: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    sweeps.write()
    sweeps.run("--limit", "3", "--jobs", "2")
    assert len(sweeps.finished()) == 3
    assert reported == []
    assert "not complete" in capsys.readouterr().out
    sweeps.run()
    assert len(sweeps.finished()) == 4


def test_what_would_make_runs_incomparable_stops_the_driver(
    sweeps: Any, reported: list[Path]
) -> None:
    sweeps.write(seeds=[0])
    sweeps.run("--limit", "1")
    sweep = open_sweep(load(sweeps.folder / "sweep.yaml"))
    from ropepp.sweep.runner import Driver

    file = sweeps.folder / "base.yaml"
    content = yaml.safe_load(file.read_text())
    content["trainer"]["max_steps"] = 21
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"base.yaml or a file it names has changed"):
        Driver(sweep, [None]).run()
    with pytest.raises(InputError, match=r"base.trainer.max_steps was 20 and is 21"):
        sweeps.run()
    assert sweeps.finished() == ["rope/seed-0"]


def test_missing_things_are_found_before_the_first_run(sweeps: Any) -> None:
    sweeps.write(real=True, set={"data.corpus": "no/such/corpus"})
    with pytest.raises(InputError, match=r"data.corpus is no/such/corpus in rope"):
        sweeps.run()
    sweeps.write(name="other", launcher="no-such-launcher {args}")
    with pytest.raises(InputError, match="launcher begins with 'no-such-launcher'"):
        sweeps.run()
    assert not list(sweeps.logs.rglob("fit.log"))


def test_the_metric_must_be_there(sweeps: Any, reported: list[Path]) -> None:
    sweeps.write(metric="validation_x4/loss", seeds=[0])
    with pytest.raises(InputError, match="metric is 'validation_x4/loss'; rope/seed-0 has"):
        sweeps.run()
    assert sweeps.finished() == ["rope/seed-0"]


# Points that a sampler draws


def drawn(sweeps: Any, **changes: Any) -> list[str]:
    """Writes and runs a sampled sweep; returns the names of drawn rows."""
    sweeps.write(**{"sampler": "tpe", "trials": 4, "search": RANGE, **changes})
    sweeps.run()
    return [name for name in read_plan(sweeps.logs / "try").variants if "-lr=" in name]


def test_tpe_runs_each_point_with_all_seeds(sweeps: Any, reported: list[Path]) -> None:
    names = drawn(sweeps, variants={"ec": {"model.position": {"class_path": "RoPEppEC"}}})
    assert len(names) == len(set(names)) == 4
    assert len(sweeps.finished()) == 2 * 5  # with the row as it is
    sweep = open_sweep(load(sweeps.folder / "sweep.yaml"))
    (given,) = [t for t in sweep._study("try/ec").get_trials() if "given" in t.user_attrs]
    assert given.params == {"model.optimizer.lr": 0.01}
    for trial in sweep._drawn(sweep.spec.rows[0]):
        rate = float(sweep.spec.drawn(sweep.spec.rows[0], trial.params).name.split("=")[1])
        assert rate == pytest.approx(trial.params["model.optimizer.lr"], rel=1e-3)
        assert trial.value == pytest.approx(1.0005 + abs(rate - 0.01))

    sweeps.run()
    (sweeps.logs / "try" / "study.db").unlink()
    assert sorted(drawn(sweeps, variants=sweep.spec.variants)) == sorted(names)
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())
    more = drawn(sweeps, variants=sweep.spec.variants, trials=6, seeds=[0, 1, 2])
    assert len(set(more)) == 6
    assert len(sweeps.finished()) == 3 * 7
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())


def test_random_draws_are_the_same_for_all_variants(sweeps: Any, reported: list[Path]) -> None:
    names = drawn(sweeps, sampler="random", seeds=[0])
    rates = [[n.split("=")[1] for n in names if n.startswith(v)] for v in ("rope-", "ec-")]
    assert len(set(rates[0])) == 4
    assert set(rates[0]) == set(rates[1])
    other = drawn(sweeps, sampler="random", seeds=[0], name="try2", seed=7)
    assert other
    assert not {n.split("=")[1] for n in read_plan(sweeps.logs / "try2").variants if "=" in n} & {
        *rates[0]
    }


def test_the_pruner_ends_what_is_worse(sweeps: Any, reported: list[Path]) -> None:
    sweeps.stand_in.write_text(sweeps.stand_in.read_text().replace('"steps", 3', '"steps", 60'))
    variants = {"ec": {"model.position": {"class_path": "RoPEppEC"}}}
    pruner = {"name": "median", "n_startup_trials": 1}
    given = {"model.optimizer.lr": 0.05}
    names = drawn(sweeps, variants=variants, pruner=pruner, sampler="random", trials=6, set=given)
    pruned = [
        name for name in names if not (sweeps.directory(name) / "seed-0/result.json").exists()
    ]
    assert 0 < len(pruned) < 6
    for name in pruned:
        assert sweeps.outcome(f"{name}/seed-0")["state"] == "pruned"
        assert sweeps.starts(f"{name}/seed-1") == []
    states = sweeps.states("try/ec")
    assert states.count("PRUNED") == len(pruned)
    assert states.count("COMPLETE") == 7 - len(pruned)
    sweeps.run()
    assert all(len(sweeps.starts(f"{name}/seed-0")) == 1 for name in names)


def test_a_drawn_point_that_failed_is_tried_again(sweeps: Any, reported: list[Path]) -> None:
    source = sweeps.stand_in.read_text()
    sweeps.stand_in.write_text(source.replace("asked = []", "asked = []; rate = 1 / (seed - 1)"))
    sweeps.write(sampler="tpe", trials=2, search=RANGE)
    sweeps.run(code=1)  # all runs with seed 1
    states = sweeps.states("try/ec")
    assert states == ["FAIL"] * 2
    sweeps.stand_in.write_text(source)
    sweeps.run("--retry-failed")
    assert sorted(sweeps.states("try/ec")) == ["COMPLETE"] * 2 + ["FAIL"] * 2
    assert len(sweeps.finished()) == 2 * 2 * 3


# How an attempt ended


@pytest.mark.parametrize(
    ("code", "log", "outcome"),
    [
        (75, "stopped at step 3 on request", ("preempted", "asked to end")),
        (None, "", ("preempted", "its driver was killed")),
        (-9, "", ("preempted", "killed by signal 9")),
        (143, "", ("preempted", "killed by signal 15")),
        (1, "  exitcode  : 75 (pid: 17)", ("preempted", "asked to end")),
        (1, "  exitcode  : 75 (pid: 17)\n$ again\nerror: no", ("failed", "exit code 1: error: no")),
        (-11, "a\nb", ("failed", "exit code -11: b")),
        (76, "20 steps in a row", ("failed", "exit code 76: 20 steps in a row")),
        (1, "[rank1]: KeyError: x\nChildFailed", ("failed", "exit code 1: [rank1]: KeyError: x")),
        (1, "", ("failed", "exit code 1: ")),
    ],
)  # fmt: skip
def test_outcomes(code: int | None, log: str, outcome: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "fit.log").write_text(f"error: of an earlier attempt\n$ command\n{log}\n")
    process: Any = None
    if code is not None:
        process = subprocess.Popen(["true"])
        process.wait()
        process.returncode = code
    trial = Trial("a", 0, {})
    fit = Fit(Point("a/seed-0", "a", (trial,)), trial, tmp_path, 0, 0, process, 0)
    assert fit.outcome() == outcome


# With the real fit


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six runs that nothing happens to, and their report."""
    from conftest import Sweeps  # type: ignore[attr-defined]

    made = Sweeps(tmp_path_factory.mktemp("undisturbed"), corpus)
    real(made)
    made.run()
    return made


def real(sweeps: Any, **changes: Any) -> None:
    steps = {"trainer.max_steps": 80, "checkpoint.every_n_steps": 10}
    sweeps.write(real=True, seeds=[0, 1, 2], set=steps, **changes)


def prompts(sweeps: Any, run: str) -> int:
    """How often fit was started for a run."""
    log = (sweeps.directory(run) / "fit.log").read_text()
    return sum(line.startswith("$ ") for line in log.splitlines())


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_a_short_sweep_ends_in_a_report(undisturbed: Any) -> None:
    folder = undisturbed.logs / "try"
    assert len(undisturbed.finished()) == 6
    text = (folder / "report.md").read_text()
    assert "rope" in text
    assert "ec" in text
    assert list(folder.rglob("*tfevents*"))


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_killed_drivers_and_runs_change_no_result(
    undisturbed: Any, sweeps: Any, until: Until
) -> None:
    """The driver is killed in the third run, which goes on and is adopted; then driver and run are
    killed in the fourth, which goes on from its checkpoint."""
    real(sweeps)
    order = [f"{variant}/seed-{seed}" for seed in range(3) for variant in ("rope", "ec")]

    def reaches(run: str, step: int) -> bool:
        file = sweeps.directory(run) / "metrics.jsonl"
        return file.exists() and file.read_text().count("train/loss") >= step

    driver = sweeps.drive()
    until(lambda: reaches(order[2], 20))
    driver.kill()
    driver.communicate()
    driver = sweeps.drive()
    until(lambda: reaches(order[3], 20))
    driver.kill()
    driver.communicate()
    for pid in list(fits.writers(sweeps.directory(order[3]) / "fit.log")):
        os.kill(pid, signal.SIGKILL)
    out = finish(sweeps.drive())
    assert f"{order[3]} goes on from step" in out
    assert [prompts(sweeps, run) for run in order] == [1, 1, 1, 2, 1, 1]
    assert sweeps.finished() == undisturbed.finished() == sorted(order)
    for run in order:
        here, there = sweeps.directory(run), undisturbed.directory(run)
        assert curve(here) == curve(there)
        results = [json.loads((d / "result.json").read_text()) for d in (here, there)]
        assert results[0]["evaluation"] == results[1]["evaluation"]


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_a_run_that_diverges_leaves_the_others(sweeps: Any, reported: list[Path]) -> None:
    position = {"class_path": "RoPE"}
    diverges = {"model.optimizer.lr": 1e30, "guard.stop_after": 2}
    variants = {"bad": {"model.position": position, **diverges},
                "good": {"model.position": position}}  # fmt: skip
    sweeps.write(real=True, variants=variants, seeds=[0])
    sweeps.run(code=1)
    assert sweeps.finished() == ["good/seed-0"]
    assert "exit code 76: 2 steps in a row" in sweeps.outcome("bad/seed-0")["reason"]


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_two_sharded_processes(sweeps: Any, until: Until) -> None:
    """They end when their driver is asked to, and go on."""
    sharded = {"trainer.strategy": "fsdp2", "trainer.devices": 2, "data.micro_batch_size": 2}
    rope = {"rope": {"model.position": {"class_path": "RoPE"}}}
    sweeps.write(real=True, variants=rope, seeds=[0], set={**sharded, "trainer.max_steps": 100})
    driver = sweeps.drive()
    run = sweeps.directory("rope/seed-0")
    until((run / "metrics.jsonl").exists)
    pids = list(fits.writers(run / "fit.log"))
    assert len(pids) == 2
    driver.send_signal(signal.SIGTERM)
    finish(driver, 75)
    assert not any(map(is_alive, pids))
    assert sweeps.outcome("rope/seed-0")["state"] == "preempted"
    assert list((run / "checkpoints").glob("step-*/.metadata"))
    finish(sweeps.drive())
    result = json.loads((run / "result.json").read_text())
    assert (result["world_size"], result["steps"]) == (2, 100)
    steps = [line["step"] for line in curve(run) if "train/loss" in line]
    assert steps == list(range(1, 101))
