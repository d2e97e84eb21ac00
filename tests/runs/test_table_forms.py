"""``ropepp results`` for programs: the values as the runs wrote them."""

import csv
import io
import json
from pathlib import Path

import pytest

from helpers.sweep_files import result
from ropepp.cli import main


def test_csv_and_json_have_all_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {}
    for name, loss in (("a", 2.5), ("b, c", 1 / 3)):
        row = result("RoPE", 7, loss)
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(row))
        written[name] = row | {"run": name}
    assert main(["results", str(tmp_path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["run"]: row for row in rows} == written
    assert main(["results", str(tmp_path), "--format", "csv"]) == 0
    for line in csv.DictReader(io.StringIO(capsys.readouterr().out)):
        row = written[line["run"]]
        assert float(line["validation_loss"]) == row["validation_loss"]
        assert line["evaluation.validation/loss"] == str(row["evaluation"]["validation/loss"])
        assert line["device"] == row["device"]


def test_runs_are_named_by_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ec/seed-0", "rope/seed-0"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        row = json.dumps(result("RoPE", 0, 2.0))
        (tmp_path / "sweep" / name / "result.json").write_text(row)
    for folder, names in (
        ("", {"sweep/ec/seed-0", "sweep/rope/seed-0"}),
        ("sweep/ec/seed-0", {"seed-0"}),
    ):
        assert main(["results", str(tmp_path / folder), "--format", "json"]) == 0
        assert {row["run"] for row in json.loads(capsys.readouterr().out)} == names
