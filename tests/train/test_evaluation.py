"""Loss by position and beyond the trained length, against loops over single tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.fit_runs import arguments, fit
from ropepp.cli import main
from ropepp.data.packing.concat import ConcatRows
from ropepp.data.tokens.corpus import Corpus
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import RoPEppEC
from ropepp.train.evaluation import Evaluation
from ropepp.train.weights import load_weights

CONFIG = ModelConfig(257, 32, 2, 4, 2, 48)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    return fit(corpus, logs, "first", data__extrapolation=[2, 4], trainer__max_steps=3)


def by_hand(corpus: Path, model: Transformer, length: int) -> dict[int, list[float]]:
    """The losses of all validation tokens by position, from whole logits."""
    found: dict[int, list[float]] = {}
    rows = ConcatRows(Corpus.open(corpus, "validation"), length)
    batch = rows.batch(np.arange(len(rows)))
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["positions"], batch["document_ids"])
    losses = -logits.log_softmax(-1).gather(-1, batch["targets"].clamp(min=0).unsqueeze(-1))
    for loss, target, position in zip(
        losses.flatten(), batch["targets"].flatten(), batch["positions"].flatten(), strict=True
    ):
        if target >= 0:
            found.setdefault(int(position), []).append(float(loss))
    return found


def test_loss_by_position_and_length(run: Path, corpus: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    model = Transformer(CONFIG, RoPEppEC())
    load_weights(model, run / "checkpoints" / "step-0000003.ckpt")
    assert list(result["loss_by_position"]) == ["", "_2x", "_4x"]
    for multiple, name in ((1, ""), (2, "_2x"), (4, "_4x")):
        losses = by_hand(corpus, model, 32 * multiple)
        everything = [loss for some in losses.values() for loss in some]
        mean = sum(everything) / len(everything)
        assert result["evaluation"][f"validation{name}/loss"] == pytest.approx(mean, abs=1e-5)
        found = result["loss_by_position"][name]
        assert sum(found["count"]) == len(everything)
        assert found["position"] == sorted(found["position"])
        weighted = np.dot(found["loss"], found["count"]) / len(everything)
        assert weighted == pytest.approx(mean, abs=1e-5)
        for position in (0, 1, 2, 3):  # bins of their own
            at = found["position"].index(position)
            assert found["loss"][at] == pytest.approx(np.mean(losses[position]), abs=1e-5)
            assert found["count"][at] == len(losses[position])


def test_in_tensorboard_the_step_is_the_position(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    events = EventAccumulator(str(run))
    events.Reload()
    expected = result["loss_by_position"]["_4x"]
    shown = events.Scalars("loss_by_position/validation_4x")
    assert [event.step for event in shown] == [round(p) for p in expected["position"]]
    np.testing.assert_allclose([event.value for event in shown], expected["loss"], rtol=1e-6)


def test_without_positions_a_row_is_one_document() -> None:
    model = Transformer(CONFIG, RoPEppEC())
    ids = torch.randint(257, (3, 9))
    evaluation = Evaluation(torch.device("cpu"))
    evaluation.update(model, {"input_ids": ids[:, :-1], "targets": ids[:, 1:]})
    found = evaluation.by_position()
    assert found["count"][:4] == [3.0, 3.0, 3.0, 3.0]
    assert sum(found["count"]) == 24


def test_multiples_are_checked(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, tmp_path, "bad", data__extrapolation=[1])) == 2
    assert "data.extrapolation is [1]" in capsys.readouterr().err
