"""Bad steps are skipped and counted; too many in a row end the run with a checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fit_runs import arguments, curve, fit
from ropepp.cli import main
from ropepp.errors import Diverged
from ropepp.train.guard import StepGuard
from ropepp.train.module import LanguageModel


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float) -> None:
    """Multiplies the gradient of these steps (two micro-batches each, counted from 0)."""
    training_step = LanguageModel.training_step

    def spoiled(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        outputs = training_step(self, batch, batch_idx)
        if batch_idx // 2 in steps:
            outputs["loss"] = outputs["loss"] * factor
        return outputs

    monkeypatch.setattr(LanguageModel, "training_step", spoiled)


def test_a_step_that_is_not_finite_leaves_everything_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"checkpoint__every_n_steps": 1, "checkpoint__keep": 0, "trainer__max_steps": 5}
    spoil(monkeypatch, {2}, math.nan)
    run = fit(corpus, tmp_path, "nan", **changes)
    lines = [line for line in curve(run) if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert math.isnan(lines[2]["train/grad_norm"])
    before, after, later = (
        torch.load(run / "checkpoints" / f"step-{step:07d}.ckpt", weights_only=True)
        for step in (2, 3, 4)
    )
    for name, tensor in before["state_dict"].items():
        assert torch.equal(tensor, after["state_dict"][name])
        assert not torch.equal(tensor, later["state_dict"][name])
    states = [one["optimizer_states"][0]["state"] for one in (before, after)]
    for number, values in states[0].items():
        for key, value in values.items():
            assert torch.equal(value, states[1][number][key]), (number, key)


def test_spikes_are_off_unless_asked_for(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {29}, 1e4)
    changes = {"trainer__max_steps": 30, "data__validate_every_n_steps": 0}
    plain = fit(corpus, tmp_path, "plain", **changes)
    guarded = fit(corpus, tmp_path, "guarded", guard__spike_factor=20, **changes)
    skipped = [line["train/skipped_steps"] for line in curve(plain) if "train/loss" in line]
    assert skipped == [0] * 30
    skipped = [line["train/skipped_steps"] for line in curve(guarded) if "train/loss" in line]
    assert skipped == [0] * 29 + [1]


def test_too_many_in_a_row_end_the_run_with_a_checkpoint(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, set(range(7, 50)), math.inf)
    assert main(arguments(corpus, tmp_path, "bad", guard__stop_after=3)) == Diverged.code
    err = capsys.readouterr().err
    assert "3 steps in a row" in err
    run = tmp_path / "default" / "bad"
    assert (run / "checkpoints" / "step-0000010.ckpt").exists()
    assert not (run / "result.json").exists()


def test_history_survives_a_resume() -> None:
    guard, other = StepGuard(spike_factor=3.0), StepGuard(spike_factor=3.0)
    assert all(guard.accepts(1.0 + 0.01 * n) for n in range(150))
    assert not guard.accepts(7.0)
    assert json.loads(json.dumps(guard.state_dict())) == guard.state_dict()
    other.load_state_dict(guard.state_dict())
    assert other.skipped == 1
    assert not other.accepts(7.0)
    assert other.accepts(2.0)
