"""Attention maps of a sweep's runs, as files in their folders."""

import json
from pathlib import Path

import pytest

from helpers.fit_runs import fit
from ropepp.eval.analyze.attention_maps import MEASURES, AttentionMaps, draw
from ropepp.runs.records import Run, RunSpec
from ropepp.sweep.maps import write_maps


def run_of(directory: Path) -> Run:
    return Run(RunSpec("ec", 0, {}), directory)


def test_maps_of_a_run(
    corpus_with_more_validation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    run = fit(corpus_with_more_validation, tmp_path, "first", trainer__max_steps=5)
    drawn: list[AttentionMaps] = []

    def keep(maps: AttentionMaps, path: Path) -> None:
        drawn.append(maps)
        draw(maps, path)

    monkeypatch.setattr("ropepp.sweep.maps.draw", keep)
    assert write_maps(run_of(run), rows=2) is None
    content = json.loads((run / "attention.json").read_text())
    assert content["checkpoint"] == "step-0000005.ckpt"
    assert content["heads"] == {"real": 4, "imaginary": 4}
    assert (content["rows"], content["length"]) == (2, 32)
    assert set(content["measures"]["imaginary"]) == set(MEASURES)
    assert len(content["measures"]["real"]["distance"]) == 2
    assert (run / "attention.png").is_file()
    assert drawn[0].weights["real"].shape == (2, 32, 32)
    assert write_maps(run_of(run), most_tokens=1) is None
    assert json.loads((run / "attention.json").read_text())["rows"] == 1


def test_maps_of_recall(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = {
        "data": "RecallDataModule",
        "data__vocab_size": 64,
        "data__pairs": 2,
        "data__corpus": None,
        "data__lengths": "[1]",
        "trainer__max_steps": 2,
        "data__validate_every_n_steps": 0,
    }
    run = fit(tmp_path, tmp_path, "recall", **data)
    assert write_maps(run_of(run), rows=2) is None
    assert json.loads((run / "attention.json").read_text())["length"] == 32


def test_reasons_for_no_maps(corpus: Path, tmp_path: Path) -> None:
    assert write_maps(run_of(tmp_path)) == "it has no complete checkpoint"
    run = fit(corpus, tmp_path, "first", trainer__max_steps=2)
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("ropepp.data.loading.datamodule.CorpusDataModule", "mine.Data"))
    assert "is Data: rows come from" in str(write_maps(run_of(run)))
    config.write_text(text.replace(str(corpus), str(tmp_path / "gone")))
    assert "is no folder" in str(write_maps(run_of(run)))
    config.unlink()
    assert write_maps(run_of(run)) == "config.yaml is missing"
