"""A run that was killed and resumed equals the uninterrupted one, bit for bit."""

import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.fit_runs import curve, fit, start, wait_for_step

SLOW = {"trainer__max_steps": 45, "data__validate_every_n_steps": 15}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "workers", "compiled"),
    [(23, 2, False), (32, 0, False), pytest.param(23, 0, True, marks=pytest.mark.extra)],
)
def test_killed_and_resumed(
    corpus: Path, tmp_path: Path, kill_at: int, workers: int, compiled: bool
) -> None:
    changes = {**SLOW, "data__num_workers": workers, "model__compute_dtype": "bfloat16"}
    changes["model__compile"] = compiled
    whole = fit(corpus, tmp_path, "whole", **changes)

    process = start(corpus, tmp_path, "killed", **changes)
    run = tmp_path / "default" / "killed"
    wait_for_step(process, run, kill_at)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "result.json").exists()

    fit(corpus, tmp_path, "killed", ckpt_path="last", **changes)
    assert curve(run) == curve(whole)
    assert [line["step"] for line in curve(run) if "train/loss" in line] == list(range(1, 46))

    events = EventAccumulator(str(run))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 46))


def test_longer_than_an_epoch_with_accumulation(corpus: Path, tmp_path: Path) -> None:
    """Resumed at every checkpoint of a run over several epochs."""
    changes = {
        "data__sequence_length": 256,
        "data__micro_batch_size": 2,
        "data__validate_every_n_steps": 4,
        "checkpoint__every_n_steps": 3,
        "checkpoint__keep": 0,
        "trainer__max_steps": 14,
    }
    whole = fit(corpus, tmp_path, "whole", **changes)
    for checkpoint in sorted((whole / "checkpoints").iterdir())[:-1]:
        run = fit(corpus, tmp_path, f"from-{checkpoint.stem}", ckpt_path=str(checkpoint), **changes)
        first = int(checkpoint.stem.split("-")[1])
        assert curve(run) == [line for line in curve(whole) if line["step"] > first]
