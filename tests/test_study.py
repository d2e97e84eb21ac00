"""Studies: what is run follows from results, which a clone keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import study as study_script
import study_page
from ropepp.errors import InputError
from studies import CONTENT, LOSSES, finish, search, write
from study import Study
from study_page import Results

STUDIES = sorted((Path(study_script.__file__).parents[1] / "configs" / "study").glob("*.yaml"))


@pytest.fixture
def toy(tmp_path: Path) -> Study:
    return write(tmp_path)


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
        "base": ["other.yaml"],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"copies has another base or set than .*final"):
        toy.copy("copies")
    del toy.parts["copies"]["base"]
    toy.parts["copies"]["cells"] = {"best": {"a": 2}}  # they were made with 1
    with pytest.raises(InputError, match=r"a is 2, but .*with 1"):
        toy.copy("copies")
    assert not (toy.logs / "copies").exists()
    toy.parts["copies"]["cells"] = {"best": {}}
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
    study.check_records()
    _, _, module = study_page.read_page(study)
    fixed = {
        part: [row.name for row in study.rows(part)]
        for part in study.parts
        if "best" not in study.parts[part]
    }
    for contrast in module.PRIMARY:
        for part, variant, cell in (contrast.one, contrast.other):
            assert part not in fixed or f"{variant}_{cell}" in fixed[part]


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


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_damaged_files_of_runs_end_nothing(toy: Study) -> None:
    for row, loss in LOSSES.items():
        finish(toy, "search", row, 100, loss)
    torn, short = (toy.logs / "search" / row / "seed-100" for row in list(LOSSES)[:2])
    (torn / "result.json").write_text('{"validation_loss": 4.')
    (short / "metrics.jsonl").unlink()  # as a run that logs less often than it is long
    toy.collect("search")
    assert toy.records.keys() == {("search", row, 100) for row in list(LOSSES)[1:]}
    assert Study(toy.file).records == toy.records


def test_runs_that_are_to_be_made_again_stay_until_they_are(
    toy: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search(toy, LOSSES)
    key = ("search", "ec_std-1_lr-0.001", 100)
    toy.again[key] = toy.records.pop(key)
    folder = toy.logs / key[0] / key[1] / "seed-100"
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    finish(toy, "search", "rope_more", 100, 3.0)
    toy.collect("search")
    assert key in Study(toy.file).records
    (folder / "result.json").write_text(result.replace("4.3", "4.25"))
    toy.collect("search")
    assert toy.records[key]["result"]["validation_loss"] == 4.25
    assert "was 4.3, and is 4.25 now" in capsys.readouterr().out


BAD_STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key of a part": (
        {"parts": {"a": {"cels": {}}}},
        r"parts\.a has the key cels; allowed",
    ),
    "no seeds": ({"parts": {"a": {"seeds": None}}}, r"parts\.a needs seeds, variants"),
    "unknown variant": (
        {"parts": {"a": {"variants": ["eh"]}}},
        "variants has eh; allowed: ec, rope",
    ),
    "unknown recipe": ({"parts": {"a": {"cells": {"x": {"recipe": "no"}}}}}, "no recipe no"),
    "unknown key": ({"partz": {}}, "has the key partz; allowed"),
    "another name": ({"name": "tox"}, "name is tox"),
    "no base": ({"base": None}, "needs base"),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_what_is_no_study_is_refused(toy: Study, name: str) -> None:
    changes, words = BAD_STUDIES[name]
    content = {**CONTENT, **changes}
    if "parts" in changes:
        part = {"variants": ["rope"], "seeds": [0]} | changes["parts"]["a"]
        content["parts"] = {"a": {key: own for key, own in part.items() if own is not None}}
    content = {key: own for key, own in content.items() if own is not None}
    toy.file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=words):
        Study(toy.file)
    toy.file.write_text("a: [")
    with pytest.raises(InputError, match="is no YAML"):
        Study(toy.file)


def test_rows_of_one_name_are_refused(toy: Study) -> None:
    toy.content["variants"] |= {"a": {}, "a_b": {}}
    toy.parts["two"] = {"variants": ["a", "a_b"], "cells": {"b_c": {}, "c": {}}, "seeds": [0]}
    with pytest.raises(InputError, match="two rows named a_b_c"):
        toy.rows("two")


def test_records_that_are_none_of_the_studys_are_refused(toy: Study) -> None:
    search(toy, LOSSES)
    toy.check_records()
    lines = toy.store.read_text().splitlines()
    for bad, words in (
        (lines[0][:90], r"line 9 is no run"),
        ("", r"line 9 is no run"),
        ("{}", r"line 9 is no run \('part' is missing\)"),
        (lines[0], "line 9 is search, .* once more"),
    ):
        toy.store.write_text("\n".join([*lines, bad, *lines[:0]]) + "\n")
        with pytest.raises(InputError, match=words):
            Study(toy.file)
    for old, new, words in (
        ('"seed":100', '"seed":77', "seed 77 is not in"),
        ('"part":"search"', '"part":"sought"', "part sought is not in"),
        ('"row":"', '"row":"x', "search, x.*is not in"),
        ('"overrides":{', '"overrides":{"model.optimizer.lr":9,', r"lr is 0.00.*with 9"),
    ):
        toy.store.write_text("\n".join([lines[0].replace(old, new), *lines[1:]]) + "\n")
        with pytest.raises(InputError, match=words):
            Study(toy.file).check_records()


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
