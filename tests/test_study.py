"""Studies: what is run follows from results, which a clone keeps; statistics by other means."""

import importlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

import study as study_script
import study_page
from ropepp.errors import InputError
from study import Study
from study_page import Contrast, Results, comparisons, paired, verdict

STUDIES = sorted((Path(study_script.__file__).parents[1] / "configs" / "study").glob("*.yaml"))
CONTENT: dict[str, Any] = {
    "name": "toy",
    "prepare": ["sotu", "--out", "data/toy"],
    "base": ["base.yaml"],
    "keys": {"std": "model.network.o_proj.std.gain", "lr": "model.optimizer.lr"},
    "variants": {
        "rope": {"display": "RoPE", "model.position": {"class_path": "RoPE"}},
        "ec": {"model.position": {"class_path": "RoPEppEC"}},
    },
    "parts": {
        "search": {
            "variants": ["rope", "ec"],
            "grid": {"std": [1.0, 0.5], "lr": [1e-3, 2e-3]},
            "seeds": [100],
        },
        "again": {
            "variants": ["rope", "ec"],
            "best": {"of": ["search"], "keep": 2},
            "seeds": [101, 102],
        },
        "final": {
            "variants": ["rope", "ec"],
            "best": {"of": ["search", "again"], "keep": 1},
            "seeds": [0, 1, 2],
        },
        "rule": {
            "variants": ["ec"],
            "best": {"of": ["search", "again"], "keep": 1, "variant": "rope"},
            "cells": {"as-it-is": {}, "smaller": {"std": 0.1}},
            "seeds": [0],
        },
        "both": {
            "variants": ["rope"],
            "cells": {"today": {"lr": 7e-3}},
            "best": {"of": ["search", "again"], "keep": 1},
            "best_cells": {"best": {"trainer.max_steps": 9}},
            "seeds": [0],
        },
    },
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(study_script, "ROOT", tmp_path)
    return write(tmp_path)


def write(folder: Path) -> Study:
    file = folder / "configs" / "study" / "toy.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return Study(file)


def finish(study: Study, part: str, row: str, seed: int, loss: float | None) -> None:
    """What a run leaves behind."""
    folder = study.logs / part / row / f"seed-{seed}"
    folder.mkdir(parents=True)
    trial = {"variant": row, "seed": seed, "overrides": {"a": 1}, "settings": {}}
    (folder / "trial.json").write_text(json.dumps(trial))
    lines = [
        {"step": 2, "train/loss": 3.25, "train/grad_norm": 0.5, "other": 1},
        {"step": 4, "train/loss": 3.0, "train/grad_norm": None},
        {"step": 4, "validation/loss": loss},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"validation_loss": loss, "steps": 4, "hyper_parameters": {"much": 1}}
    (folder / "result.json").write_text(json.dumps(result))


def search(study: Study, losses: dict[str, float | None]) -> None:
    for row, loss in losses.items():
        finish(study, "search", row, 100, loss)
    study.collect("search")


LOSSES: dict[str, float | None] = {
    "rope_std-1_lr-0.001": 5.0, "rope_std-1_lr-0.002": 4.0, "rope_std-0.5_lr-0.001": 4.5,
    "rope_std-0.5_lr-0.002": None, "ec_std-1_lr-0.001": 4.3, "ec_std-1_lr-0.002": 4.1,
    "ec_std-0.5_lr-0.001": 4.2, "ec_std-0.5_lr-0.002": 4.4,
}  # fmt: skip


def test_a_grid_is_all_cells_of_all_variants(toy: Study) -> None:
    rows = toy.rows("search")
    assert {row.name for row in rows} == set(LOSSES)
    one = next(row for row in rows if row.name == "ec_std-0.5_lr-0.002")
    assert one.settings == {"model.network.o_proj.std.gain": 0.5, "model.optimizer.lr": 0.002}


def test_the_best_follow_from_results_and_divergence_is_the_worst(toy: Study) -> None:
    with pytest.raises(InputError, match="search is not complete"):
        toy.rows("again")
    search(toy, LOSSES)
    assert [row.name for row in toy.rows("again")] == [
        "rope_std-1_lr-0.002", "rope_std-0.5_lr-0.001", "ec_std-1_lr-0.002", "ec_std-0.5_lr-0.001",
    ]  # fmt: skip
    # The mean over all three seeds decides, and cells with one seed are out of it.
    for row, first, second in (
        ("rope_std-1_lr-0.002", 4.8, 4.8), ("rope_std-0.5_lr-0.001", 4.4, 4.4),
        ("ec_std-1_lr-0.002", 4.0, 4.0), ("ec_std-0.5_lr-0.001", 4.0, 4.0),
    ):  # fmt: skip
        finish(toy, "again", row, 101, first)
        finish(toy, "again", row, 102, second)
    toy.collect("again")
    rope, ec = toy.rows("final")
    assert (rope.name, rope.settings["model.network.o_proj.std.gain"]) == ("rope_best", 0.5)
    assert (ec.name, ec.settings["model.network.o_proj.std.gain"]) == ("ec_best", 1.0)
    asis, smaller = toy.rows("rule")
    assert asis.settings == rope.settings
    assert smaller.settings == rope.settings | {"model.network.o_proj.std.gain": 0.1}
    today, best = toy.rows("both")
    assert today.settings == {"model.optimizer.lr": 7e-3}
    assert best.settings == rope.settings | {"trainer.max_steps": 9}


def test_a_recipe_is_the_variants_own(toy: Study) -> None:
    toy.content["recipes"] = {"best": {"rope": {"std": 0.5, "lr": 1.0}, "ec": {"std": 0.25}}}
    toy.parts["recipe"] = {
        "variants": ["rope", "ec"],
        "cells": {"it": {"recipe": "best", "lr": 2.0}},
    }
    rope, ec = toy.rows("recipe")
    std, lr = CONTENT["keys"]["std"], CONTENT["keys"]["lr"]
    assert rope.settings == {std: 0.5, lr: 2.0}
    assert ec.settings == {std: 0.25, lr: 2.0}


def test_runs_are_measured_once(toy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def measured(command: list[str], **_: Any) -> int:
        calls.append(command[-3:])
        (Path(command[-1]) / "measures.json").write_text('{"measure": "recall", "far": 0.75}')
        return 0

    monkeypatch.setattr(study_script.subprocess, "call", lambda *_, **__: 1)
    toy.parts["search"]["measure"] = "recall"
    search(toy, {"rope_std-1_lr-0.001": 5.0})
    assert not toy.records  # tried again later
    monkeypatch.setattr(study_script.subprocess, "call", measured)
    toy.collect("search")
    toy.collect("search")
    run = toy.logs / "search" / "rope_std-1_lr-0.001" / "seed-100"
    assert calls == [["scripts/study_measures.py", "recall", str(run)]]
    far = study_page.Quantity(("measures", "far"))
    assert Results(toy).losses("search", "rope", "std-1_lr-0.001", far) == {100: 0.75}
    toy.records = {}
    toy.collect("search")
    assert len(calls) == 1  # it is kept beside the run
    (run / "measures.json").write_text('{"measure": "text", "far": 0.5}')  # another one
    toy.records = {}
    toy.collect("search")
    assert len(calls) == 2
    lost = study_page.Quantity(("measures", "near"))
    assert Results(toy).losses("search", "rope", "std-1_lr-0.001", lost) == {}


def test_runs_of_another_study_are_copied(toy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(toy, "final", "rope_best", 0, 4.0)
    finish(toy, "final", "rope_best", 1, 4.5)
    there = toy.logs / "final" / "rope_best" / "seed-0"
    (there / "measures.json").write_text("{}")
    (toy.logs / "final" / "rope_best" / "seed-1" / "result.json").unlink()  # not finished
    toy.parts["copies"] = {
        "variants": ["rope"], "cells": {"best": {}}, "seeds": [0, 1, 2], "same": "toy/final",
    }  # fmt: skip
    commands: list[list[str]] = []
    monkeypatch.setattr(toy, "drive", lambda part, command, jobs: commands.append(command))
    monkeypatch.setattr(study_script, "POLL", 0.0)
    toy.run("copies", 1)
    toy.collect("copies")
    here = toy.logs / "copies" / "rope_best" / "seed-0"
    names = {"trial.json", "result.json", "metrics.jsonl", "measures.json"}
    assert {path.name for path in here.iterdir()} == names
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
    assert toy.records.keys() == {("copies", "rope_best", 0)}
    # What is left was tried twice, failed runs the second time, and is listed.
    assert ["--retry-failed" in command for command in commands] == [False, True]
    toy.content["parts"] = toy.parts = {"copies": toy.parts["copies"]}
    assert toy.missing() == ["copies/rope_best/seed-1", "copies/rope_best/seed-2"]


def test_parts_with_a_base_and_a_beginning_of_their_own(toy: Study, tmp_path: Path) -> None:
    toy.logs.mkdir(parents=True)
    toy.parts["on"] = {
        "base": ["other.yaml"], "set": {"a": 1}, "begin": "base/rope_today",
        "variants": ["ec"], "seeds": [3],
    }  # fmt: skip
    content = yaml.safe_load(toy.write_sweep("on").read_text())
    assert content["base"] == [str((tmp_path / "configs/study/other.yaml").resolve())]
    assert content["set"] == {"a": 1}
    assert f"study_begin.py {toy.socket} {toy.logs}/base/rope_today {{args}}" in content["launcher"]


@pytest.mark.parametrize("name", [path.stem for path in STUDIES])
def test_studies_that_are_here(name: str) -> None:
    """Every part's rows can be told, and every page has a block for every mark."""
    study = Study(Path(study_script.__file__).parents[1] / "configs" / "study" / f"{name}.yaml")
    for part, how in study.parts.items():
        if "best" not in how:
            assert study.rows(part)
        assert set(how["variants"]) <= study.content["variants"].keys()
    page = study.store.parent.with_suffix(".md").read_text()
    module = importlib.import_module(f"study_{study.name.replace('-', '_')}")
    marks = [mark[2] for mark in study_page.MARKS.finditer(page)]
    assert sorted(marks) == sorted(module.BLOCKS)
    fixed = {
        part: [row.name for row in study.rows(part)]
        for part in study.parts
        if "best" not in study.parts[part]
    }
    for contrast in module.PRIMARY:
        for part, variant, cell in (contrast.one, contrast.other):
            assert part not in fixed or f"{variant}_{cell}" in fixed[part]
    for part in study.parts:  # a clone takes over everything that was run
        if not study.lacks(part):
            for row, seed in itertools.product(study.rows(part), study.seeds(part)):
                study.check(row, study.records[part, row.name, seed]["trial"])


def test_a_clone_takes_over_what_was_run(toy: Study, tmp_path: Path) -> None:
    toy.content["base"] = [str(STUDIES[0].parents[1] / "experiment" / "recall.yaml")]
    search(toy, LOSSES)
    assert all("hyper_parameters" not in record["result"] for record in toy.records.values())
    stored = toy.store.read_text()
    toy.logs.rename(tmp_path / "elsewhere")
    clone = write(tmp_path)
    assert clone.records == toy.records
    clone.content["base"] = toy.content["base"]
    del clone.records["search", "ec_std-1_lr-0.001", 100]
    clone.restore("search")
    known = {path.parent.parent.name for path in clone.logs.glob("search/*/seed-100/result.json")}
    assert known == set(LOSSES) - {"ec_std-1_lr-0.001"}
    folder = clone.logs / "search" / "ec_std-1_lr-0.002" / "seed-100"
    assert json.loads((folder / "result.json").read_text())["validation_loss"] == 4.1
    # As the sweep plans it today, not by the overrides with which it was begun.
    trial = json.loads((folder / "trial.json").read_text())
    assert trial["overrides"]["model.optimizer.lr"] == 0.002
    clone.records = {}
    clone.collect("search")
    before, after = (map(json.loads, x.splitlines()) for x in (stored, clone.store.read_text()))
    kept = [record for record in before if record["row"] != "ec_std-1_lr-0.001"]
    for old, new in zip(kept, after, strict=True):
        assert {**new, "trial": old["trial"]} == old


def test_what_was_run_with_another_value_is_refused(toy: Study) -> None:
    row = next(row for row in toy.rows("search") if row.name == "ec_std-0.5_lr-0.002")
    position = {"class_path": "RoPEppEC", "init_args": {"theta": 1e4}}  # with today's defaults
    made = {"model.position": position, "model.optimizer.lr": 0.002, "gone": 1}
    toy.check(row, {"seed": 100, "overrides": made})
    for key, value in (("model.optimizer.lr", 0.001), ("model.position", {"class_path": "RoPE"})):
        with pytest.raises(InputError, match=rf"ec_std-0.5_lr-0.002: {key} is .*seed 100"):
            toy.check(row, {"seed": 100, "overrides": made | {key: value}})


def test_weights_that_another_part_begins_with_are_made_again(toy: Study, tmp_path: Path) -> None:
    """Where a clone has the results alone."""
    toy.parts["long"] = {"variants": ["rope"], "cells": {"on": {}}, "seeds": [0, 1]}
    toy.parts["long"]["begin"] = "short/rope_today"
    toy.parts["short"] = {"variants": ["rope", "ec"], "seeds": [0, 1]}
    for row, seed in (("rope_today", 0), ("rope_today", 1), ("ec_today", 0), ("ec_today", 1)):
        toy.records["short", row, seed] = {}
    kept = toy.logs / "short" / "rope_today" / "seed-1" / "checkpoints" / "step-0000001.ckpt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert toy.lost("short") == [("short", "rope_today", 0)]
    kept.unlink()
    toy.records["long", "rope_on", 0] = {}
    assert toy.lost("short") == [("short", "rope_today", 1)]  # of seeds that are missing alone
    toy.records["long", "rope_on", 1] = {}
    assert toy.lost("short") == []


def test_a_complete_part_starts_nothing(toy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    search(toy, LOSSES)
    monkeypatch.setattr(study_script.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    toy.run("search", 2)


def test_the_sweep_that_is_written_is_one(toy: Study, tmp_path: Path) -> None:
    (tmp_path / "configs" / "base.yaml").write_text("trainer: {max_steps: 9}\n")
    toy.content["base"] = ["../base.yaml"]
    toy.logs.mkdir(parents=True)
    content = yaml.safe_load(toy.write_sweep("search").read_text())
    assert set(content["variants"]) == set(LOSSES)
    assert content["seeds"] == [100]


DIFFERENCES = [0.013, -0.02, 0.055, 0.031, 0.018, 0.042, 0.001, 0.027]


def test_statistics_by_scipy(toy: Study) -> None:
    for seed, difference in enumerate(DIFFERENCES):
        for part, row, value in (("final", "rope_best", 4.0), ("final", "ec_best", 4 + difference)):
            finish(toy, part, row, seed, value + 0.1 * seed)
    toy.collect("final")
    results = Results(toy)
    found = paired(results.losses("final", "ec", "best"), results.losses("final", "rope", "best"))
    assert found == pytest.approx(DIFFERENCES)
    sides = ("final", "ec", "best"), ("final", "rope", "best")
    table = comparisons(results, [Contrast("it", *sides)])
    test = scipy.stats.ttest_1samp(DIFFERENCES, 0.0)
    low, high = test.confidence_interval(0.95)
    assert f"| 8 | {np.mean(DIFFERENCES):+.3f} | {low:+.3f} to {high:+.3f} |" in table
    assert f"| {test.pvalue:.2g} |" in table
    flips = scipy.stats.permutation_test(
        (DIFFERENCES,), np.sum, permutation_type="samples", n_resamples=math.inf
    )
    assert f"| {flips.pvalue:.2g} |" in table


def test_differences_that_are_all_equal() -> None:
    assert study_page.t_test_p([0.0] * 4) == 1
    assert study_page.t_test_p([0.5] * 4) == 0
    assert verdict(1.0, 0.0, 0.0, 4) == "not seen"
    assert verdict(0.0, 0.5, 0.0, 4) == "shown: higher"


@pytest.mark.parametrize(
    ("p", "mean", "sd", "words"),
    [
        (0.001, -0.05, 0.02, "shown: lower"),
        (0.001, 0.05, 0.02, "shown: higher"),
        (0.5, 0.001, 0.01, "not seen"),
        (0.5, 0.001, 0.05, "undecided"),
        (0.06, 0.05, 0.02, "undecided"),
    ],
)
def test_words(p: float, mean: float, sd: float, words: str) -> None:
    assert verdict(p, mean, sd, 12) == words


def test_a_page_keeps_the_words_around_its_tables(
    toy: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(toy, LOSSES)
    page = toy.store.parent.with_suffix(".md")
    page.write_text("before\n\n<!-- make one -->\nold\n<!-- end -->\nafter\n")
    module = type("Blocks", (), {"BLOCKS": {"one": lambda results: "new\n"}})
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    study_page.write_page(toy)
    wanted = "before\n\n<!-- make one -->\nnew\n<!-- end -->\nafter\n"
    assert page.read_text() == wanted
    study_page.write_page(toy)
    assert page.read_text() == wanted
    assert len(toy.store.with_suffix(".csv").read_text().splitlines()) == 1 + len(LOSSES)
