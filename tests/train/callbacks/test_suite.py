"""The suite in the training loop: right numbers, on any number of processes, and no side effect."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.corpora import change_record
from helpers.fit_runs import arguments, curve, finish, fit, start
from ropepp.cli import main
from ropepp.data.packing.concat import Concat
from ropepp.data.tokens.corpus import Corpus
from ropepp.interop.saved import open_model

STEPS = 10


def suite(**settings: Any) -> dict[str, Any]:
    """Flags that add a suite every 5 steps."""
    settings = {"every_n_steps": 5, "lengths": [16, 64], "rows": 5, **settings}
    flags = {f"suite__{key}": value for key, value in settings.items()}
    return {**flags, "trainer__max_steps": STEPS}


def split(run: Path) -> tuple[dict[int, dict[str, float]], list[dict[str, Any]]]:
    """The suite's values by step, and the curve without them."""
    found: dict[int, dict[str, float]] = {}
    others = []
    for line in curve(run):
        if any(key.startswith("suite/") for key in line):
            found[line.pop("step")] = line
        else:
            others.append(line)
    return found, others


def loss_by_hand(corpus: Path, run: Path, step: int, length: int) -> float:
    model = open_model(run / "checkpoints" / f"step-{step:07d}.ckpt").model
    batch = Concat().rows(Corpus.open(corpus, "validation"), length, True).batch(np.arange(5))
    logits = model(batch["input_ids"], batch["positions"], batch["document_ids"])
    kept = batch["targets"] >= 0
    nll = -logits.log_softmax(-1)[kept].gather(-1, batch["targets"][kept].unsqueeze(-1))
    return float(nll.mean())


def test_text(corpus: Path, tmp_path: Path) -> None:
    plain = fit(corpus, tmp_path, "plain", trainer__max_steps=STEPS)
    run = fit(corpus, tmp_path, "suite", **suite(corpus=str(corpus)))
    found, others = split(run)
    assert others == curve(plain)  # bit for bit
    assert list(found) == [5, 10]
    for step, values in found.items():
        assert len(values) == 4
        for length in (16, 64):
            loss = loss_by_hand(corpus, run, step, length)
            assert values[f"suite/loss_{length}"] == pytest.approx(loss, abs=1e-5)
            assert values[f"suite/perplexity_{length}"] == pytest.approx(np.exp(loss), rel=1e-5)


@pytest.mark.slow
def test_sharded_over_two_processes(corpus: Path, tmp_path: Path) -> None:
    """5 rows on two processes: one of them has padding, and none waits for the other."""
    settings = suite(corpus=str(corpus)) | {
        "trainer__strategy": "fsdp2",
        "data__micro_batch_size": 2,
    }
    for n in (1, 2):
        finish(start(corpus, tmp_path, f"by-{n}", trainer__devices=n, **settings))
    (one, others), (two, others_of_two) = (split(tmp_path / "default" / f"by-{n}") for n in (1, 2))
    assert list(one) == list(two) == [5, 10]
    for step in (5, 10):
        assert two[step] == pytest.approx(one[step], rel=2e-5)
        loss = loss_by_hand(corpus, tmp_path / "default" / "by-2", step, 64)
        assert two[step]["suite/loss_64"] == pytest.approx(loss, abs=1e-5)
    assert len(others) == len(others_of_two)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_steps": -1}, "suite.every_n_steps is -1"),
        ({"lengths": []}, "suite.lengths is []"),
        ({}, "suite.corpus is missing"),
        ({"corpus": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input(
    corpus: Path, tmp_path: Path, settings: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, tmp_path, "bad", **suite(**settings))) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "default" / "bad" / "metrics.jsonl").exists()


def test_another_tokenizer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    change_record(other / "validation" / "meta.json", tokenizer_fingerprint="f" * 64)
    assert main(arguments(corpus, tmp_path, "bad", **suite(corpus=str(other)))) == 2
    assert "made with tokenizer ffffffffffff" in capsys.readouterr().err
