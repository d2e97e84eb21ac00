"""Driving a sweep: everything runs once, whatever dies."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from helpers.sweep_runs import Sweeps, finish, is_alive, wait_until
from ropepp.commands.sweep import slots
from ropepp.errors import InputError
from ropepp.runs import process as run_process
from ropepp.runs.records import read_plan
from ropepp.sweep.config import load
from ropepp.sweep.study import open_sweep

RUNS = ["ec/seed-0", "ec/seed-1", "rope/seed-0", "rope/seed-1"]
SLOW = {"steps": 40, "pause": 0.05}


def test_everything_runs_once(
    sweeps: Sweeps, reported: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.write()
    sweeps.run()
    assert sweeps.finished() == RUNS
    assert reported == [sweeps.logs / "try"]
    out = capsys.readouterr().out
    assert "[4/4] ec/seed-1 finished: validation_loss 1.0010 in" in out
    assert "rope/seed-0 started; output in" in out
    sweeps.run()  # nothing is left
    assert sweeps.states() == ["complete"] * 4
    assert all(len(sweeps.starts(run)) == 1 for run in RUNS)


def test_a_crash_leaves_the_others(
    sweeps: Sweeps, reported: list[Path], capsys: pytest.CaptureFixture[str]
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
    assert sweeps.states() == ["failed", "complete", "complete", "complete"]
    assert len(reported) == 1

    sweeps.behave({})
    sweeps.run(code=1)  # not tried again unless asked
    assert len(sweeps.starts("rope/seed-0")) == 1
    sweeps.run("--retry-failed")
    assert sweeps.finished() == RUNS
    assert [len(sweeps.starts(run)) for run in RUNS] == [1, 1, 2, 1]


def test_all_fail(sweeps: Sweeps, reported: list[Path]) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"crash": 1}, "ec/seed-0": {"crash": 1}})
    sweeps.run(code=1)
    assert reported == []


def test_killed_runs_go_on_unless_they_come_no_further(
    sweeps: Sweeps, reported: list[Path]
) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"kill": 3}})  # its checkpoint is at step 2
    sweeps.run(code=1)
    assert len(sweeps.starts("rope/seed-0")) == 4
    reason = "killed by signal 9, 3 times without a new checkpoint"
    assert sweeps.outcome("rope/seed-0")["reason"] == reason
    assert sweeps.finished() == ["ec/seed-0"]


def test_a_preempted_run_goes_on(sweeps: Sweeps) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": SLOW})
    driver = sweeps.drive()
    metrics = sweeps.directory("rope/seed-0") / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4)
    os.kill(sweeps.starts("rope/seed-0")[0]["pid"], signal.SIGTERM)
    out = finish(driver)
    assert "asked to end; it can go on" in out
    assert "rope/seed-0 goes on from step" in out
    assert len(sweeps.starts("rope/seed-0")) == 2
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_a_driver_that_is_asked_to_end_takes_its_runs_along(
    sweeps: Sweeps,
    reported: list[Path],
) -> None:
    sweeps.write()
    sweeps.behave(dict.fromkeys(RUNS, SLOW))
    driver = sweeps.drive("--jobs", "2")
    begun = ["rope/seed-0", "ec/seed-0"]
    wait_until(lambda: all((sweeps.directory(run) / "metrics.jsonl").exists() for run in begun))
    driver.send_signal(signal.SIGTERM)
    assert "asked to end; the same command goes on" in finish(driver, 75)
    for run in begun:
        assert sweeps.outcome(run)["state"] == "preempted"
        assert not is_alive(sweeps.starts(run)[0]["pid"])
        assert list((sweeps.directory(run) / "checkpoints").iterdir())
    assert sweeps.finished() == []
    assert sweeps.states() == ["open"] * 4
    sweeps.behave({})
    sweeps.run()
    assert sweeps.finished() == RUNS
    assert [len(sweeps.starts(run)) for run in RUNS] == [2, 1, 2, 1]


def test_what_does_not_end_is_killed_after_a_while(sweeps: Sweeps) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {**SLOW, "pause": 1, "stubborn": True, "helper": True}})
    driver = sweeps.drive("--grace", "1")
    wait_until((sweeps.directory("rope/seed-0") / "metrics.jsonl").exists)
    log = sweeps.directory("rope/seed-0") / "fit.log"
    pids = list(run_process.writers(log))
    assert len(pids) == 2  # one of them in a session of its own
    driver.send_signal(signal.SIGINT)
    began = time.monotonic()
    finish(driver, 75)
    assert time.monotonic() - began > 1
    assert not any(map(is_alive, pids))


def test_processes_that_a_run_leaves_behind_are_ended(
    sweeps: Sweeps, reported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_process, "LINGERING", 0.2)
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {"helper": True}})
    sweeps.run()
    assert sweeps.finished() == ["ec/seed-0", "rope/seed-0"]
    assert not list(run_process.writers(sweeps.directory("rope/seed-0") / "fit.log"))


def test_two_drivers_share_a_sweep(sweeps: Sweeps) -> None:
    sweeps.write(seeds=[0, 1, 2])
    sweeps.behave({f"{v}/seed-{s}": {"pause": 0.3} for v in ("rope", "ec") for s in range(3)})
    drivers = [sweeps.drive("--jobs", "2") for _ in range(2)]
    outs = [finish(driver) for driver in drivers]
    assert len(sweeps.finished()) == 6
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())
    assert sweeps.states() == ["complete"] * 6
    assert all(" started" in out for out in outs)
    assert all("reported" in out for out in outs)


@pytest.mark.slow
def test_two_drivers_set_up_one_sweep(sweeps: Sweeps) -> None:
    sweeps.write(seeds=[0])
    for out in [finish(driver) for driver in [sweeps.drive(init=False) for _ in range(2)]]:
        assert "Traceback" not in out
    assert sweeps.finished() == ["ec/seed-0", "rope/seed-0"]
    assert sweeps.states() == ["complete"] * 2


def test_orphans_are_adopted_and_not_run_twice(sweeps: Sweeps) -> None:
    sweeps.write()
    sweeps.behave({"rope/seed-0": SLOW, "ec/seed-0": {**SLOW, "steps": 100}})
    driver = sweeps.drive("--gpus", "3,5")
    wait_until(lambda: all(sweeps.starts(run) for run in ("rope/seed-0", "ec/seed-0")))
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


def test_an_adopted_run_is_asked_to_end_too(sweeps: Sweeps) -> None:
    sweeps.write(seeds=[0])
    sweeps.behave({"rope/seed-0": {**SLOW, "steps": 4000}})
    driver = sweeps.drive()
    wait_until((sweeps.directory("rope/seed-0") / "metrics.jsonl").exists)
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


def test_a_grid_that_has_grown_runs_what_is_new(sweeps: Sweeps, reported: list[Path]) -> None:
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


def test_devices_are_handed_out_one_by_one(sweeps: Sweeps, reported: list[Path]) -> None:
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


def test_limit(sweeps: Sweeps, reported: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    sweeps.write()
    sweeps.run("--limit", "3", "--jobs", "2")
    assert len(sweeps.finished()) == 3
    assert reported == []
    assert "not complete" in capsys.readouterr().out
    sweeps.run()
    assert len(sweeps.finished()) == 4


def test_what_would_make_runs_incomparable_stops_the_driver(
    sweeps: Sweeps, reported: list[Path]
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


def test_missing_things_are_found_before_the_first_run(sweeps: Sweeps) -> None:
    sweeps.write(real=True, set={"data.corpus": "no/such/corpus"})
    with pytest.raises(InputError, match=r"data.corpus is no/such/corpus in rope"):
        sweeps.run()
    sweeps.write(name="other", launcher="no-such-launcher {args}")
    with pytest.raises(InputError, match="launcher begins with 'no-such-launcher'"):
        sweeps.run()
    assert not list(sweeps.logs.rglob("fit.log"))


def test_the_metric_must_be_there(sweeps: Sweeps, reported: list[Path]) -> None:
    sweeps.write(metric="validation_x4/loss", seeds=[0])
    with pytest.raises(InputError, match="'validation_x4/loss', which rope/seed-0 has not"):
        sweeps.run()
    assert sweeps.finished() == ["rope/seed-0"]


def test_damaged_files_are_named_and_their_runs_repeated(
    sweeps: Sweeps, reported: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.write()
    sweeps.run()
    trial = (sweeps.directory("rope/seed-0") / "trial.json").read_bytes()
    (sweeps.directory("rope/seed-0") / "trial.json").write_bytes(trial[:9])
    (sweeps.directory("ec/seed-1") / "result.json").write_bytes(b'{"validation_loss": 1')
    (sweeps.directory("ec/seed-1") / "outcome.json").write_bytes(b"\xff")
    (sweeps.logs / "try/sweep.json").write_bytes(b"[]")
    with pytest.warns(UserWarning, match="is damaged") as warned:
        sweeps.run()
    said = "\n".join(str(one.message) for one in warned)
    for name in ("rope/seed-0/trial.json", "ec/seed-1/result.json", "ec/seed-1/outcome.json"):
        assert name in said
    runs = [f"{variant}/seed-{seed}" for variant in ("rope", "ec") for seed in (0, 1)]
    assert [len(sweeps.starts(run)) for run in runs] == [1, 1, 1, 2]
    assert (sweeps.directory("rope/seed-0") / "trial.json").read_bytes() == trial
    assert sweeps.states() == ["complete"] * 4


def test_a_damaged_memory_of_what_was_asked(sweeps: Sweeps, reported: list[Path]) -> None:
    """The runs' own files tell whether they are still the same ones."""
    sweeps.write()
    sweeps.run()
    (sweeps.logs / "try/resolved.json").write_bytes(b"\0")
    variants = {"rope": {"model.position": {"class_path": "ALiBi"}}}
    sweeps.write(variants=variants)
    with (
        pytest.warns(UserWarning, match=r"resolved.json is damaged"),
        pytest.raises(InputError, match=r"rope/seed-\d was begun with other settings"),
    ):
        sweeps.run()
    sweeps.write()
    with pytest.warns(UserWarning, match=r"resolved.json is damaged"):
        sweeps.run()
    assert len(sweeps.starts("rope/seed-0")) == 1


def test_a_link_out_of_the_sweep_is_refused(sweeps: Sweeps, tmp_path: Path) -> None:
    sweeps.write()
    (tmp_path / "elsewhere").mkdir()
    (sweeps.logs / "try").mkdir()
    (sweeps.logs / "try/rope").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"try/rope/seed-0 is a link out of .*try, to .*elsewhere"):
        sweeps.run()
    assert list((tmp_path / "elsewhere").iterdir()) == []
