"""How a sweep stands, read from its run directories alone; needs Python's standard library alone.

Beside a run's own files its directory holds::

    lock            locked by the driver that cares for the run; says where its process is
    fit.log         output of ``fit``, locked as long as any process of it lives
    outcome.json    how an attempt without a result ended: failed, preempted or pruned
"""

import fcntl
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropepp.files import lock, opened
from ropepp.runs.records import METRICS, RESULT, read_json, read_lines, read_result, read_runs

LOCK, LOG, OUTCOME = "lock", "fit.log", "outcome.json"
TAIL = 32768  # bytes of metrics.jsonl or of a log in which the newest lines are looked for
STATES = ("finished", "running", "waiting", "preempted", "failed", "pruned")
ENDED = ("finished", "failed", "pruned")
CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come; losses are the last logged ones, or the result's."""

    name: str
    state: str
    step: int = 0
    max_steps: int | None = None  # None before it has begun
    train_loss: float | None = None
    validation_loss: float | None = None
    seconds_left: float | None = None  # by its speed
    reason: str = ""


def is_locked(file: Path) -> bool:
    """Whether some process holds a file's lock."""
    try:
        with opened(file) as handle:
            return not lock(handle, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False


def state_of(directory: Path) -> str:
    """One of `STATES`."""
    if read_result(directory):
        return "finished"
    if is_locked(directory / LOG):
        return "running"
    if outcome := read_outcome(directory):
        return str(outcome["state"])
    # Without an outcome whoever drove it died with it.
    return "preempted" if (directory / LOG).exists() else "waiting"


def read_outcome(directory: Path) -> dict[str, Any]:
    """How an attempt without a result ended, empty if nothing tells; state and reason."""

    def check(content: dict[str, Any]) -> None:
        if content["state"] not in STATES or not isinstance(content["reason"], str):
            raise ValueError(f"state is {content['state']!r}, allowed: {', '.join(STATES)}")

    return read_json(directory / OUTCOME, check)


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; those still being written have other names."""
    matches = ((CHECKPOINT.fullmatch(path.name), path) for path in directory.glob("step-*"))
    return [path for _, path in sorted((int(m[1]), path) for m, path in matches if m)]


def progress_of(directory: Path, name: str) -> RunProgress:
    """How far a run has come, without reading all that it has logged."""
    state = state_of(directory)
    newest: dict[str, Any] = {}
    for line in read_lines(directory / METRICS, TAIL):
        newest |= line
    result, outcome = read_result(directory), read_outcome(directory)
    reason = outcome.get("reason", "") if state == "failed" else ""
    if not result and (directory / RESULT).exists():
        reason = f"{RESULT} is damaged: it will be repeated"
    step, last = newest.get("step", 0), _max_steps(directory)
    return RunProgress(
        name,
        state,
        step,
        last,
        newest.get("train/loss"),
        result.get("validation_loss", newest.get("validation/loss")),
        _seconds_left(newest, step, last) if state == "running" else None,
        reason,
    )


def _max_steps(directory: Path) -> int | None:
    try:
        config = (directory / "config.yaml").read_bytes()
    except OSError:
        return None
    found = re.search(rb"^  max_steps: (\d{1,18})$", config, re.M)
    return int(found[1]) if found else None


def _seconds_left(newest: dict[str, Any], step: int, last: int | None) -> float | None:
    rate = newest.get("utilisation/tokens_per_second")
    if not step or not last or not rate:
        return None
    return (last - step) * newest.get("train/tokens", 0.0) / step / rate


def status(folder: Path) -> list[RunProgress]:
    """How all runs of a sweep stand; an `InputError` if it is no sweep's folder."""
    return [progress_of(run.directory, run.spec.run) for run in read_runs(folder)]


def table(folder: Path, runs: Iterable[RunProgress]) -> str:
    """For people: a line a run, and a sum."""
    rows: list[tuple[str, ...]] = [("run", "state", "step", "train loss", "validation", "left")]
    runs = list(runs)
    for run in runs:
        steps = f"{run.step:,} / {run.max_steps:,}" if run.max_steps else ""
        losses = (run.train_loss, run.validation_loss)
        shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        left = "" if run.seconds_left is None else duration(run.seconds_left)
        rows.append((run.name, run.state, steps, *shown, left))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        aligned = zip(row, "<<>>>>", widths, strict=True)
        cells = [f"{cell:{side}{width}}" for cell, side, width in aligned]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{run.name} {run.state}: {run.reason}" for run in runs if run.reason]
    counts = Counter(run.state for run in runs)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    return "\n".join([*lines, f"{folder}: {', '.join(parts) or 'no runs'}"])


def duration(seconds: float) -> str:
    """Seconds in two units at most."""
    minutes = seconds / 60
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def show(folder: Path, watch: bool) -> None:
    """Prints the table, again and again if watched, until all runs have ended."""
    while True:
        runs = status(folder)
        if watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(table(folder, runs), flush=True)
        if not watch or all(run.state in ENDED for run in runs):
            return
        time.sleep(2)
