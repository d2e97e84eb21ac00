"""The commands from a trained run to the files, and errors before any work."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.fit_runs import fit
from ropepp.commands.analyze import main
from ropepp.errors import InputError
from ropepp.eval.analyze.recall import recall_accuracy
from ropepp.eval.analyze.rows import read_rows
from ropepp.interop.saved import open_model

for package in ("matplotlib", "scipy"):
    pytest.importorskip(package)
Files = tuple[dict[str, Any], list[dict[str, str]], EventAccumulator]
RECALL = {
    "data": "RecallDataModule",
    "data__vocab_size": 64,
    "data__pairs": 2,
    "data__corpus": None,
    "data__lengths": "[1]",
    "data__validate_every_n_steps": 0,
}


@pytest.fixture(scope="module")
def corpus(corpus_with_more_validation: Path) -> Path:
    return corpus_with_more_validation


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "ec", trainer__max_steps=3)


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("recall")
    return fit(logs, logs, "recall", trainer__max_steps=2, **RECALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"word{i * i % 97}" for i in range(120)))
    return file


def read(folder: Path, name: str, images: list[str]) -> Files:
    """The .json, the .csv, which must agree, and the events; the figures are PNG."""
    content = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["table"])
    for line, entry in zip(lines, content["table"], strict=True):
        assert line == {k: "" if v is None else str(v) for k, v in entry.items()}
    for image in images:
        assert (folder / f"{image}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob(f"*tfevents*.{name}"))) == 1
    assert not list(folder.glob("*.tmp"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {f"{name}/{image}" for image in images} <= set(events.Tags()["images"])
    return content, lines, events


def test_noise_on_own_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["noise", str(run), "--stds", "0", "1", "--draws", "3", "--rows", "4"]
    for _ in range(2):  # the second replaces the first
        main([*args, "--out", str(tmp_path)])
    content, lines, events = read(tmp_path, "noise", ["noise"])
    assert content["equal_number_of_heads"]
    assert content["disturbed_heads_of_a_layer"] == {"real": 4, "imaginary": 4}
    assert (content["rows"], content["length"], content["unit"]) == (4, 32, "documents")
    saved = open_model(run)
    ids = read_rows(saved, 4).ids
    nll = -saved.model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    by_key = {(line["metric"], float(line["std"])): line for line in lines}
    assert float(by_key["loss", 0]["clean"]) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert by_key["loss", 0]["verdict"] == "identical"
    assert float(by_key["loss", 0]["imaginary"]) == 0
    assert float(by_key["loss", 1]["imaginary"]) != 0
    shown = events.Scalars("noise/loss/imaginary")
    assert [event.step for event in shown] == [0, 1000]
    assert shown[1].value == pytest.approx(float(by_key["loss", 1]["imaginary"]), rel=1e-5)
    assert "noise on 4 real or 4 imaginary heads" in capsys.readouterr().out


def test_noise_on_recall(recall_run: Path, tmp_path: Path) -> None:
    args = ["--metric", "recall", "--stds", "2", "--draws", "2", "--rows", "16"]
    main(["noise", str(recall_run), *args, "--out", str(tmp_path)])
    content, lines, _ = read(tmp_path, "noise_recall", ["noise_recall"])
    assert [line["metric"] for line in lines] == ["accuracy", "loss"]
    cells = recall_accuracy(open_model(recall_run).model, [2], [32], 16, vocab_size=64)
    hits, answers = sum(cell.hits for cell in cells), sum(cell.answers for cell in cells)
    assert content["table"][0]["clean"] == hits / answers


def test_attention(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["attention", str(run), "--text", str(text), "--out", str(tmp_path)])
    content, lines, events = read(tmp_path, "attention", ["attention_maps"])
    T = 32
    assert content["rows"] == len(text.read_bytes()) // (T + 1)
    assert content["heads_of_a_layer"] == {"real": 4, "imaginary": 4}
    first = [line for line in lines if line["kind"] == "real" and line["measure"] == "distance"]
    assert [line["layer"] for line in first] == ["all", "1", "2"]
    shown = events.Scalars("attention/distance/real")
    assert [event.step for event in shown] == [1, 2]
    assert shown[0].value == pytest.approx(float(first[1]["mean"]), rel=1e-5)
    assert "over pairs of heads" in capsys.readouterr().out


def test_recall(recall_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--pairs", "2", "3", "--lengths", "32", "64", "--rows", "9"]
    main(["recall", str(recall_run), *args, "--out", str(tmp_path)])
    content, _, events = read(tmp_path, "recall", ["recall"])
    cells = recall_accuracy(open_model(recall_run).model, [2, 3], [32, 64], 9, vocab_size=64)
    assert content["table"] == [asdict(cell) for cell in cells]
    assert content["trained_length"] == 32
    assert content["chance"] == 1 / 21
    shown = events.Scalars("recall/accuracy/3_pairs")
    assert [e.step for e in shown] == [cell.distance_low for cell in cells if cell.pairs == 3]
    assert "chance 0.048" in capsys.readouterr().out


def test_recall_has_as_many_rows_as_asked(recall_run: Path) -> None:
    text = read_rows(open_model(recall_run), 300, 48)
    assert text.inputs.shape == (300, 48)


def test_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--theta", "1e4", "5e5", "--scaling", "PI:8", "--head_dim", "16", "--length", "600"]
    main(["curves", *args, "--trained_length", "64", "--out", str(tmp_path)])
    content, lines, events = read(tmp_path, "curves", ["curves", "seen"])
    names = ["theta 10000", "theta 500000", "theta 10000, PI 8"]
    assert list(content["coverage"]) == list(content["curves"]) == names
    assert [line["setting"] for line in lines] == [name for name in names for _ in range(8)]
    curve = content["curves"]["theta 10000, PI 8"]
    f = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8) / 8
    d = torch.tensor(curve["distance"], dtype=torch.float64)
    expected = (d[:, None] * f).sin().mean(1)
    torch.testing.assert_close(
        torch.tensor(curve["imaginary"], dtype=torch.float64), expected, rtol=0, atol=1e-4
    )
    assert curve["distance"][-1] == 599
    assert events.Scalars("curve/real/theta 10000")[0].value == 1
    assert "with imaginary" in capsys.readouterr().out


def test_rows_of_text(run: Path, text: Path, tmp_path: Path) -> None:
    saved = open_model(run)
    rows = read_rows(saved, 3, 10, [text])
    content = text.read_bytes()
    assert rows.ids.tolist() == [list(content[at : at + 11]) for at in (0, 11, 22)]
    assert rows.inputs.shape == (3, 10)
    own = read_rows(saved, 100)  # all documents, of the trained length
    assert own.ids.shape == (7, 33)
    shorter = read_rows(saved, 3, 300)
    assert (shorter.inputs.shape[1], shorter.unit) == (300, "documents")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xff")
    for path, words in ((tmp_path / "no.txt", r"no\.txt is missing"), (bad, "not UTF-8 at byte 2")):
        with pytest.raises(InputError, match=words):
            read_rows(saved, 3, 10, [path])
    with pytest.raises(InputError, match=r"no text of .* has that many tokens"):
        read_rows(saved, 3, 10_000, [text])
    with pytest.raises(InputError, match=r"length is 10000; the longest document .* allowed are 1"):
        read_rows(saved, 3, 10_000)


def test_bad_input(run: Path, recall_run: Path, corpus: Path, tmp_path: Path) -> None:
    rope = fit(corpus, tmp_path, "rope", trainer__max_steps=1, model__position="RoPE")
    out = ["--out", str(tmp_path / "out")]
    cases = [
        (["noise", str(rope)], "RoPE, which has no imaginary heads"),
        (["noise", str(tmp_path / "no")], "does not exist"),
        (["noise", str(run), "--metric", "recall"], "recall is for models trained on it"),
        (["recall", str(run)], "data is CorpusDataModule|CorpusDataModule: recall is for"),
        (["attention", str(run)], "7 rows of 32 tokens .* need at least 8"),
        (["noise", str(run), "--draws", "1"], "draws is 1"),
        (["noise", str(recall_run)], "--metric recall, or --text"),
        (["curves", "--scaling", "NTK:8"], "allowed: PI:FACTOR, YaRN:FACTOR"),
        (["curves", "--scaling", "PI:x"], "'x' is no number"),
        (["curves", "--scaling", "PI:0.5"], "factor is 0.5"),
        (["curves", "--theta", "1"], "--theta is 1"),
        (["curves", "--head_dim", "7"], "7 of 7 head components .* an even number"),
        (["curves", "--length", "100"], "--trained_length is 4096 and --length 100"),
    ]
    for args, words in cases:
        with pytest.raises(InputError, match=words):
            main([*args, *out])
    assert not (tmp_path / "out").exists()
    for args in (["noise", str(run), "--rows", "0"], ["noise"]):
        with pytest.raises(InputError, match="noise: "):
            main(args)
