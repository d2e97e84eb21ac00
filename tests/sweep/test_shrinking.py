"""Reports after a YAML has lost or renamed rows whose runs are still in the folder."""

from pathlib import Path
from typing import Any

import pytest

from helpers.sweep_files import report_rows, report_table, result, write_plan, write_run
from helpers.sweep_runs import Sweeps
from ropepp.errors import InputError
from ropepp.runs.records import RunSpec, SweepPlan
from ropepp.sweep.config import load
from ropepp.sweep.report import write_report

ROPE, EC = ({"model.position": {"class_path": name}} for name in ("RoPE", "RoPEppEC"))
LAYERS = "model.network.num_layers"
BEFORE: dict[str, Any] = {
    "variants": {"rope": ROPE, "ec": EC},
    "axes": {LAYERS: [1, 2]},
    "seeds": [0, 1, 2, 3],
}


def loss(row: str, seed: int) -> float:
    """Two layers are better by far, and EC is by a little."""
    noise = (0.004, -0.003, 0.002, 0.001)[seed]
    return 3.0 - 0.5 * ("=2" in row) - (0.02 + noise) * row.startswith("ec") + seed / 10


def planned(sweeps: Sweeps, **changes: Any) -> SweepPlan:
    return load(sweeps.write(**{**BEFORE, **changes})).plan()


def write_runs(folder: Path, plan: SweepPlan) -> None:
    """Its plan, and all runs of it."""
    write_plan(folder, plan)
    for row in plan.variants:
        for seed in plan.seeds:
            write_run(folder, row, seed, result(row, seed, loss(row, seed)))


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"axes": {LAYERS: [1]}}, 8),
        ({"axes": {LAYERS: [2]}}, 8),
        ({"variants": {"ec": EC}}, 8),
        ({"seeds": [1, 0, 2]}, 4),
        ({"axes": {LAYERS: [1, 2], "model.z_loss": [0.1]}}, 16),
        ({}, 0),
    ],
    ids=["first", "last", "baseline", "seed", "axis", "nothing"],
)
def test_the_report_is_of_what_the_yaml_asks_for(
    changes: dict[str, Any], gone: int, sweeps: Sweeps, tmp_path: Path
) -> None:
    """The same as if nothing else had been run, but for a line that says what there is besides."""
    before, after = planned(sweeps), planned(sweeps, **changes)
    old, new = tmp_path / "old", tmp_path / "new"
    write_runs(old, before)
    for folder in (old, new):
        write_runs(folder, after)
        write_report(folder)
    assert (old / "report.csv").read_bytes() == (new / "report.csv").read_bytes()
    assert set(report_table(old)) == set(after.variants)
    texts = [(at / "report.md").read_text().replace(str(at), "FOLDER") for at in (old, new)]
    more = [line for line in texts[0].splitlines() if line not in texts[1].splitlines()]
    assert all(line.startswith("* Not in the YAML any more, and left out: ") for line in more)
    specs = [RunSpec(row, seed, {}) for row in before.variants for seed in before.seeds]
    left = [spec.run for spec in specs if not after.has(spec)]
    assert len(left) == gone
    assert sorted(", ".join(more).rpartition(": ")[2].rstrip(".").split(", ")) == (
        sorted(left) or [""]
    )


def test_no_row_is_compared_with_one_of_other_values(sweeps: Sweeps, tmp_path: Path) -> None:
    write_runs(tmp_path / "a", planned(sweeps))
    write_plan(tmp_path / "a", planned(sweeps, axes={LAYERS: [1]}))
    write_report(tmp_path / "a")
    text = (tmp_path / "a/report.md").read_text()
    assert list(report_rows(text, "Results")) == ["rope, num_layers 1", "ec, num_layers 1"]
    row = report_table(tmp_path / "a")["ec-num_layers=1"]
    assert row["p_holm"] == row["p"]  # the only comparison
    assert float(row["difference"]) == pytest.approx(-0.021)


def test_a_folder_without_any_run_of_its_yaml(sweeps: Sweeps, tmp_path: Path) -> None:
    write_runs(tmp_path / "a", planned(sweeps))
    write_plan(tmp_path / "a", planned(sweeps, seeds=[7]))
    with pytest.raises(InputError, match=r"has no finished run of its YAML; `ropepp sweep run`"):
        write_report(tmp_path / "a")


def test_a_plan_that_names_no_seeds_has_all() -> None:
    plan = SweepPlan("a", "", "rope", variants=["rope"])
    assert plan.has(RunSpec("rope", 7, {}))
    assert not plan.has(RunSpec("ec", 7, {}))
