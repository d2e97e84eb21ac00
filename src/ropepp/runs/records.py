"""What a sweep leaves on disk, and reading it back; needs Python's standard library alone.

A sweep's folder is ``LOGS/NAME/``::

    sweep.json                     the resolved sweep (see `SweepPlan`)
    VARIANT/seed-N/trial.json      what a run is (see `RunSpec`), written before it starts
    VARIANT/seed-N/...             the run's own files: config.yaml, metrics.jsonl, result.json

A run's own files are the truth: it is done when ``result.json`` is there.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropepp.errors import InputError

PLAN, TRIAL, RESULT, METRICS = "sweep.json", "trial.json", "result.json", "metrics.jsonl"


@dataclass(frozen=True)
class RunSpec:
    """What one run of a sweep is.

    Attributes:
        variant: Name of the row it belongs to; runs of one variant differ in their seed alone.
        seed: Its seed.
        overrides: Keys of ``fit`` and their values, besides the base configuration.
        settings: What tells variants apart, short names to plain values (for tables and HParams).
    """

    variant: str
    seed: int
    overrides: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Name of the run in the sweep's folder."""
        return f"{self.variant}/seed-{self.seed}"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it was asked for.

    Attributes:
        name: Its name, which is that of its folder.
        question: What it is meant to answer, in a sentence.
        baseline: The variant to which others are compared.
        metric: Key of ``result.json`` that is compared, smaller is better.
        shared_learning_rate: Whether all variants have one learning rate, a bias to name.
        variants: Names in the order of the table.
        display: Names for people, by variant.
        controls: Variants that equal the baseline by construction: what they differ by is noise.
    """

    name: str
    question: str
    baseline: str
    metric: str = "validation_loss"
    shared_learning_rate: bool = True
    variants: list[str] = field(default_factory=list)
    display: dict[str, str] = field(default_factory=dict)
    controls: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A run and what has come of it.

    Attributes:
        spec: What it is.
        directory: Its folder.
        result: Content of ``result.json``, empty unless done.
    """

    spec: RunSpec
    directory: Path
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether it has a result."""
        return bool(self.result)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The complete lines of ``metrics.jsonl``."""
        file = self.directory / METRICS
        if not file.exists():
            return
        with file.open() as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)


def read_plan(folder: Path) -> SweepPlan:
    """The sweep of a folder.

    Raises:
        InputError: It is none.
    """
    file = folder / PLAN
    if not file.is_file():
        raise InputError(f"{folder} is no sweep's folder: {PLAN} is missing")
    return SweepPlan(**json.loads(file.read_text()))


def read_runs(folder: Path) -> list[Run]:
    """All runs of a sweep, by variant in the plan's order and seed."""
    order = {name: number for number, name in enumerate(read_plan(folder).variants)}
    runs = []
    for file in folder.rglob(TRIAL):
        result = file.parent / RESULT
        content = json.loads(result.read_text()) if result.is_file() else {}
        runs.append(Run(RunSpec(**json.loads(file.read_text())), file.parent, content))
    return sorted(runs, key=lambda run: (order.get(run.spec.variant, len(order)), run.spec.seed))


def metric_value(result: dict[str, Any], metric: str, run: str) -> float:
    """The metric of a finished run, from its result or the evaluation in it; NaN for null.

    Args:
        result: Content of ``result.json``.
        metric: A key of it, or of its evaluation.
        run: The run's name, for the error.

    Raises:
        InputError: It has no such number.
    """
    known = {**result.get("evaluation", {}), **result}
    if metric not in known or not isinstance(known[metric], int | float | None):
        numbers = [key for key, value in known.items() if type(value) in (int, float)]
        raise InputError(f"metric is {metric!r}, which {run} has not; it has {', '.join(numbers)}")
    return math.nan if known[metric] is None else float(known[metric])
