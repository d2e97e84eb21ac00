"""Each step stands once in metrics.jsonl and TensorBoard, whatever earlier attempts have left."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp.errors import InputError
from ropepp.train.logger import RunLogger

POSITIONS = {"": {"position": [0.0, 1.5, 3.0], "loss": [3.0, 2.0, 1.0]}}


def attempt(run: Path, begin: int, end: int, metrics: bool = True, ends: bool = False) -> None:
    """Steps from one to the other, each logged with its attempt's own value."""
    logger = RunLogger(run)
    run.mkdir(exist_ok=True)
    logger.cut(begin)
    for step in range(begin + 1, end + 1):
        if metrics:
            logger.log_metrics({"train/loss": float(begin)}, step)
        else:  # a kill came between the two
            logger.experiment.add_scalar("train/loss", float(begin), step)
    if ends:
        logger.log_by_position(POSITIONS)
    logger.sync()
    logger.experiment.close()


def shown(run: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run)).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


@pytest.mark.parametrize("clock", [0, 1, -1000])
@pytest.mark.parametrize("metrics", [True, False])
def test_each_step_once(
    tmp_path: Path, clock: int, metrics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three attempts: within one second, later, or each with a clock that went back."""
    run, now = tmp_path / "run", time.time()
    for number, (begin, end) in enumerate([(0, 6), (4, 9), (4, 8)]):
        monkeypatch.setattr("time.time", lambda n=number: now + n * clock)
        attempt(run, begin, end, metrics or number > 0, ends=True)
    # Of the steps that are kept, the first attempt's; then those of the last alone.
    kept = [(step, 0.0) for step in range(1, 5)] + [(step, 4.0) for step in range(5, 9)]
    assert shown(run) == kept
    assert shown(run, "loss_by_position/validation") == [(0, 3.0), (2, 2.0), (3, 1.0)]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]
    assert found == (kept if metrics else kept[4:])


def test_a_damaged_log_is_kept_aside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempt(run, 0, 3)
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    damaged = b'\xff\xfe\n[1]\n{"train/loss": 1}\n' + whole + b'{"step": 4, "train/l'
    file.write_bytes(damaged)
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl is damaged: kept as metrics.jsonl.damaged"
    ):
        attempt(run, 3, 3)
    assert file.read_bytes() == whole
    assert (run / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    attempt(run, 0, 1)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"run/metrics.jsonl cannot be written: Is a directory"):
        RunLogger(run).log_metrics({"train/loss": 1.0}, 2)
