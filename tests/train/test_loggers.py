"""Loggers of the user's choice beside ours get the same metrics, and the configuration."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.fit_runs import fit, metrics


def with_logger(name: str, **settings: Any) -> dict[str, Any]:
    kind = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": settings}
    return {"trainer__logger": kind, "trainer__max_steps": 4, "data__validate_every_n_steps": 2}


def test_csv_logger_gets_what_metrics_jsonl_gets(corpus: Path, tmp_path: Path) -> None:
    run = fit(corpus, tmp_path, "a", **with_logger("CSVLogger", save_dir=str(tmp_path / "csv")))
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    seen: dict[int, dict[str, float]] = {}
    with file.open() as lines:
        for line in csv.DictReader(lines):
            own = {key: float(value) for key, value in line.items() if value and key != "step"}
            seen.setdefault(int(line["step"]), {}).update(own)
    wanted: dict[int, dict[str, float]] = {}
    for line in metrics(run):
        wanted.setdefault(line.pop("step"), {}).update(line)
    assert wanted
    assert {step: {k: v for k, v in own.items() if k != "epoch"} for step, own in seen.items()} == {
        step: pytest.approx(own) for step, own in wanted.items()
    }
    settings = yaml.safe_load(file.with_name("hparams.yaml").read_text())
    assert settings == yaml.safe_load((run / "config.yaml").read_text())


def test_mlflow_file_store(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlruns").as_uri()
    run = fit(corpus, tmp_path, "a", **with_logger("MLFlowLogger", tracking_uri=store))
    (loss,) = (tmp_path / "mlruns").rglob("metrics/train/loss")
    steps = [int(line.split()[2]) for line in loss.read_text().splitlines()]
    assert steps == [line["step"] for line in metrics(run) if "train/loss" in line]
    (lr,) = (tmp_path / "mlruns").rglob("params/model/optimizer/init_args/lr")
    assert float(lr.read_text()) == 0.01
    assert json.loads((run / "result.json").read_text())["steps"] == 4
