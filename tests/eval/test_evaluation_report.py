"""What an evaluation leaves: nothing of another one is lost, and nothing of its own."""

import errno
import fcntl
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers import evaluated
from ropepp.cli import main
from ropepp.eval.evaluated_model import ResultCache
from ropepp.files import DiskError

TABLES = ("evaluation.md", "evaluation.csv", "evaluation.json")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, and texts of which some cannot be read."""
    tokenizer = evaluated.make_tokenizer()
    for seed in (0, 1):
        evaluated.write_folder(tmp_path / f"m{seed}", tokenizer, seed)
    (tmp_path / "good.txt").write_text(evaluated.sentence(Random(6), 60))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "good.txt").write_text(evaluated.sentence(Random(7), 60))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("e")
    (tmp_path / "nulls.jsonl").write_text('{"text": "en"}\n{"text": null}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*args: str, text: tuple[str, ...] = ("good.txt",), out: str = "e") -> int:
    settings = ("--suite", "perplexity", "--lengths", "24", "--device", "cpu", "--out", out)
    return main(["evaluate", *args, *settings, "--text", *text])


def test_tables_of_another_evaluation_are_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {}
    for number, models in enumerate((["m0"], ["m1"], ["m0", "m1"])):
        assert evaluate(*models) == 0
        first[number] = (place / "e" / "evaluation.md").read_text()
        assert ("are kept" in capsys.readouterr().err) == (number > 0)
    assert (place / "e" / "evaluation-1.md").read_text() == first[0]
    assert (place / "e" / "evaluation-2.md").read_text() == first[1]
    # The same one again takes the place of its own tables; of other weights it does not.
    assert evaluate("m0", "m1") == 0
    assert not (place / "e" / "evaluation-3.md").exists()
    weights = (place / "m0" / "model.safetensors").read_bytes()
    (place / "m1" / "model.safetensors").write_bytes(weights)
    (place / "m1" / "checksums.json").unlink()  # it was changed on purpose
    assert evaluate("m0", "m1") == 0
    assert (place / "e" / "evaluation-3.md").read_text() == first[2]


def test_a_second_evaluation_into_a_folder_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "e").mkdir()
    with (place / "e" / ".evaluate.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert evaluate("m0") == 2
        assert "e is in use by another process" in capsys.readouterr().err
    assert evaluate("m0") == 0


def test_texts_that_cannot_be_read_are_named_and_the_rest_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("good.txt", "empty.txt", "nulls.jsonl", "short.txt", "other/good.txt", "good.txt")
    # A tokenizer without BOS, so that there is a text of one token.
    with pytest.warns(UserWarning, match="trained with tokenizer"):
        assert evaluate("m0", "--tokenizer", "bytes", text=texts) == 0
    shown = capsys.readouterr()
    for words in (
        "left out: empty: empty.txt is empty",
        "left out: nulls: nulls.jsonl, line 2: field 'text' is NoneType",
        "left out: short 24: a text has 1 tokens",
    ):
        assert words in shown.err
        assert words in (place / "e" / "evaluation.md").read_text()
    found = json.loads((place / "e" / "evaluation.json").read_text())["results"]
    assert {row["task"] for row in found} == {"good", "other/good.txt"}
    assert evaluate("m0", text=("nulls.jsonl",), out="f") == 2
    assert "nulls.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["good.txt", "good.txt/e", "/proc/e", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused_before_work(
    place: Path, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropepp.eval.evaluate.open_model", None)
    assert evaluate("m0", out=out) == 2
    assert f"{out} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*TABLES, "items.jsonl"])
def test_a_folder_in_place_of_a_file_is_refused(
    place: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropepp.eval.evaluate.evaluate", None)
    (place / "e" / name).mkdir(parents=True)
    assert evaluate("m0") == 2
    assert f"{name} cannot be written" in capsys.readouterr().err


def test_numbers_are_shown_where_they_cannot_be_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that fills up in the meantime."""
    assert evaluate("m0", out="whole") == 0
    whole = capsys.readouterr().out

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    begin = ResultCache.__init__

    def begin_full(self: ResultCache, path: Path) -> None:
        begin(self, path)
        self.path = Path("/dev/full")

    monkeypatch.setattr(ResultCache, "__init__", begin_full)
    monkeypatch.setattr("ropepp.eval.report.write_text", full)
    assert evaluate("m0") == 2
    shown = capsys.readouterr()
    assert shown.out == whole
    assert shown.err.count("; going on") == 1
    assert "/dev/full cannot be written: No space left on device; going on" in shown.err
    assert "error: e cannot be written: No space left on device; free some space" in shown.err


def test_an_evaluation_goes_on_where_its_events_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: Any) -> None:
        raise DiskError("logs/a/b cannot be written: Permission denied")

    monkeypatch.setattr("ropepp.eval.evaluate._to_tensorboard", refused)
    assert evaluate("m0") == 0
    assert "logs/a/b cannot be written: Permission denied" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "m0" / "model.safetensors"
    (place / "m0" / "checksums.json").unlink()
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"][:] = 1e38
    save_file(weights, file)
    assert evaluate("m0") == 0
    assert "m0: 4 values are no finite numbers" in capsys.readouterr().err
    weights["model.layers.0.mlp.down_proj.weight"][:] = math.nan
    save_file(weights, file)
    assert evaluate("m0") == 2
    assert "mlp.down_proj.weight holds NaN or infinity" in capsys.readouterr().err
    assert main(["export", "m0", "out"]) == 2
    assert "mlp.down_proj.weight holds NaN or infinity" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_what_is_no_line_of_ours_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    entry = {"key": "a", "task": "line\u2028end", "value": [1]}
    ResultCache(file).add([entry])
    with file.open("ab") as out:
        out.write(b'\xff\n[]\n{"key": []}\n' + b"[" * 100_000 + b'\n{"key": "torn", "val')
    again = ResultCache(file)
    assert dict(again) == {"a": [1]}
    again.add([{"key": "b", "value": 2}])
    assert dict(ResultCache(file)) == {"a": [1], "b": 2}
