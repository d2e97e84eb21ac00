"""Points that a sampler draws."""

from pathlib import Path
from typing import Any

import pytest

from helpers.sweep_runs import Sweeps
from ropepp.runs.records import read_plan
from ropepp.sweep.config import load
from ropepp.sweep.search import Known, is_hopeless
from ropepp.sweep.study import open_sweep

RANGE = {"model.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}}


def drawn(sweeps: Sweeps, **changes: Any) -> list[str]:
    """Writes and runs a sampled sweep; returns the names of drawn rows."""
    sweeps.write(**{"sampler": "tpe", "trials": 4, "search": RANGE, **changes})
    sweeps.run()
    return [name for name in read_plan(sweeps.logs / "try").variants if "-lr=" in name]


def test_tpe_runs_each_point_with_all_seeds(sweeps: Sweeps, reported: list[Path]) -> None:
    names = drawn(sweeps, variants={"ec": {"model.position": {"class_path": "RoPEppEC"}}})
    assert len(names) == len(set(names)) == 4
    assert len(sweeps.finished()) == 2 * 5  # with the row as it is
    study = open_sweep(load(sweeps.folder / "sweep.yaml"))
    (row,) = study.config.rows
    trials = study.drawn(row)
    assert [trial.name for trial in trials] == names
    *known, given = study._known(row, trials)  # what Optuna is told
    assert given.params == {"model.optimizer.lr": 0.01}
    assert given.value == pytest.approx(1.0005)
    for trial, point in zip(trials, known, strict=True):
        rate = float(trial.name.split("=")[1])
        assert point.params == trial.params == {"model.optimizer.lr": rate}
        assert (point.state, point.value) == ("complete", pytest.approx(1.0005 + abs(rate - 0.01)))
        assert list(point.seen) == [1, 2, 3]

    variants = study.config.variants
    assert drawn(sweeps, variants=variants) == names
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())
    more = drawn(sweeps, variants=variants, trials=6, seeds=[0, 1, 2])
    assert len(set(more)) == 6
    assert len(sweeps.finished()) == 3 * 7
    assert all(len(sweeps.starts(run)) == 1 for run in sweeps.finished())


@pytest.mark.extra
def test_random_draws_are_the_same_for_all_variants(sweeps: Sweeps, reported: list[Path]) -> None:
    names = drawn(sweeps, sampler="random", seeds=[0])
    rates = [[n.split("=")[1] for n in names if n.startswith(v)] for v in ("rope-", "ec-")]
    assert len(set(rates[0])) == 4
    assert set(rates[0]) == set(rates[1])
    other = drawn(sweeps, sampler="random", seeds=[0], name="try2", seed=7)
    assert other
    assert not {n.split("=")[1] for n in read_plan(sweeps.logs / "try2").variants if "=" in n} & {
        *rates[0]
    }


@pytest.mark.extra
def test_the_pruner_ends_what_is_worse(sweeps: Sweeps, reported: list[Path]) -> None:
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
    states = sweeps.states()
    assert states.count("pruned") == len(pruned)
    assert states.count("complete") == 2 + 6 - len(pruned)
    sweeps.run()
    assert all(len(sweeps.starts(f"{name}/seed-0")) == 1 for name in names)


@pytest.mark.extra
def test_a_drawn_point_that_failed_is_tried_again(sweeps: Sweeps, reported: list[Path]) -> None:
    source = sweeps.stand_in.read_text()
    sweeps.stand_in.write_text(source.replace("asked = []", "asked = []; rate = 1 / (seed - 1)"))
    sweeps.write(sampler="tpe", trials=2, search=RANGE)
    sweeps.run(code=1)  # all runs with seed 1
    assert sweeps.states() == ["complete", "complete", *["failed"] * 6]
    sweeps.stand_in.write_text(source)
    sweeps.run("--retry-failed")
    assert sweeps.states() == ["complete"] * 8
    assert len(sweeps.finished()) == 2 * 2 * 3


def test_no_more_is_drawn_than_there_is(sweeps: Sweeps, reported: list[Path]) -> None:
    names = drawn(sweeps, search={"model.optimizer.lr": {"choices": [0.01, 0.02]}}, seeds=[0])
    assert sorted(names) == ["ec-lr=0.01", "ec-lr=0.02", "rope-lr=0.01", "rope-lr=0.02"]
    assert sweeps.states() == ["complete"] * 6
    assert len(reported) == 1


def test_a_draw_that_was_cut_short_is_made_whole(sweeps: Sweeps, reported: list[Path]) -> None:
    """The driver was killed when it had written down the first seed's run alone."""
    changes: dict[str, Any] = {"sampler": "random", "trials": 1, "search": RANGE}
    sweeps.write(**changes)
    study = open_sweep(load(sweeps.folder / "sweep.yaml"))
    assert study.draw()
    (trial,) = study.drawn(study.config.rows[0])
    lost = study.directory(trial.runs[1])
    (lost / "trial.json").unlink()
    lost.rmdir()
    names = drawn(sweeps, **changes)
    assert names == [trial.name, trial.name.replace("rope", "ec")]
    assert len(sweeps.finished()) == 2 * 2 * 2


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_only_what_is_worse_is_hopeless(pruner: str, sweeps: Sweeps) -> None:
    options = {"name": pruner, **({"n_startup_trials": 3} if pruner == "median" else {})}
    fixed = {"trainer.max_steps": 27}
    file = sweeps.write(sampler="tpe", trials=9, search=RANGE, pruner=options, set=fixed)
    config = load(file)

    def point(loss: float, state: str = "complete") -> Known:
        seen = dict.fromkeys((3, 9, 18), loss)
        return Known({"model.optimizer.lr": 0.01}, seen, state, loss if state != "open" else None)

    others = [point(1 + number / 10) for number in range(12)]
    for loss, hopeless in ((0.5, False), (9.0, True)):
        known = [*others[:6], point(loss, "open"), *others[6:]]
        assert is_hopeless(config, known, 6, {3, 9, 18}) == hopeless
        assert not is_hopeless(config, known, 6, set())  # nothing new
