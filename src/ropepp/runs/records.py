"""What a sweep leaves on disk, and reading it back; needs Python's standard library alone.

A sweep's folder is ``LOGS/NAME/``::

    sweep.json                     the resolved sweep (see `SweepPlan`)
    VARIANT/seed-N/trial.json      what a run is (see `RunSpec`), written before it starts
    VARIANT/seed-N/...             the run's own files: config.yaml, metrics.jsonl, result.json

A run's own files are the truth: it is done when ``result.json`` is there, and whole. A kill, a full
disk or a hand may have torn any file: it counts as missing, and a warning names it.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.records import Damaged, as_record, read_object

PLAN, TRIAL, RESULT, METRICS = "sweep.json", "trial.json", "result.json", "metrics.jsonl"
DIVERGED = "diverged"  # key of a result: which of its numbers are not finite, in words


def load_json(file: Path, check: Callable[[dict[str, Any]], Any] = dict) -> dict[str, Any]:
    """Content of a JSON object, empty if the file is missing. Raises `Damaged` if it is none, or
    the check raises a KeyError, TypeError or ValueError as it lacks something."""
    try:
        content = read_object(file)
        check(content)
    except (KeyError, TypeError, ValueError) as error:
        if not file.exists():
            return {}
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise Damaged(f"{file} is damaged: {reason.removeprefix(f'{file} is ')[:200]}") from error
    return content


def read_json(file: Path, check: Callable[[dict[str, Any]], Any] = dict) -> dict[str, Any]:
    """The same; a damaged file counts as missing, with a warning."""
    try:
        return load_json(file, check)
    except Damaged as error:
        warnings.warn(f"{error}; it counts as missing", stacklevel=2)
        return {}


def read_lines(file: Path, tail: int | None = None) -> Iterator[dict[str, Any]]:
    """The complete lines of a ``metrics.jsonl``, which may be missing, each with its step; others
    are left out, with a warning. With ``tail`` only so many bytes at its end are read, without a
    word on the line that they cut."""
    bad, first, number = 0, 0, 0
    try:
        with file.open("rb") as stream:
            if tail is not None and os.fstat(stream.fileno()).st_size > tail:
                stream.seek(-tail, os.SEEK_END)
                stream.readline()
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):  # it is being written, or was when a kill came
                    continue
                content = entry(line)
                if content is not None:
                    yield content
                else:
                    bad, first = bad + 1, first or number
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"{file} cannot be read: {error.strerror}", stacklevel=2)
    if bad:
        at = "" if tail is not None else f", line {first} the first"
        warnings.warn(f"{file} is damaged: {bad} lines are no entries{at}; left out", stacklevel=2)


def entry(line: bytes) -> dict[str, Any] | None:
    """The step and the numbers of a line of ``metrics.jsonl``; None if it is no entry."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or type(step := content.get("step")) is not int:
        return None
    numbers = {
        key: value
        for key, value in content.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }
    return numbers if "step" in numbers and step >= 0 else None


@dataclass(frozen=True)
class RunSpec:
    """What one run of a sweep is."""

    variant: str  # the row it belongs to, whose runs differ in their seed alone
    seed: int
    overrides: dict[str, Any]  # keys of ``fit`` besides the base configuration
    # What tells variants apart, short names to plain values (for tables and HParams).
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Name of the run in the sweep's folder."""
        return f"{self.variant}/seed-{self.seed}"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it was asked for."""

    name: str
    question: str
    baseline: str  # the variant that others are compared to
    metric: str = "validation_loss"  # key of ``result.json``, smaller is better
    shared_learning_rate: bool = True  # of all variants: a bias to name
    variants: list[str] = field(default_factory=list)  # in the order of the table
    display: dict[str, str] = field(default_factory=dict)  # their names for people
    # They equal the baseline by construction: what they differ by is noise.
    controls: list[str] = field(default_factory=list)
    # Of variants that have one of their own: the baseline at the same values of the axes.
    baselines: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)  # of each variant; empty: all that there are

    def has(self, spec: RunSpec) -> bool:
        """Whether it asks for this run; an earlier one of its folder may have asked for more."""
        return spec.variant in self.variants and spec.seed in (self.seeds or (spec.seed,))

    def baseline_of(self, variant: str) -> str:
        """The variant that this one is compared to."""
        return self.baselines.get(variant, self.baseline)


@dataclass(frozen=True)
class Run:
    """A run and what has come of it."""

    spec: RunSpec
    directory: Path
    result: dict[str, Any] = field(default_factory=dict)  # of ``result.json``; empty unless done

    @property
    def done(self) -> bool:
        """Whether it has a result."""
        return bool(self.result)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The entries of ``metrics.jsonl``."""
        return read_lines(self.directory / METRICS)


def read_plan(folder: Path) -> SweepPlan:
    """The sweep of a folder; an `InputError` if it is none, `Damaged` if what says so is."""
    content = load_json(folder / PLAN, lambda content: as_record(content, SweepPlan, PLAN))
    if not content:
        raise InputError(f"{folder} is no sweep's folder: {PLAN} is missing")
    return SweepPlan(**content)


def read_runs(folder: Path) -> list[Run]:
    """All runs of a sweep, by variant in the plan's order and seed; an `InputError` if it is no
    sweep's folder. Where a run's ``trial.json`` is damaged, its folders' names are taken for it."""
    try:
        variants = read_plan(folder).variants
    except Damaged as error:
        warnings.warn(f"{error}; `ropepp sweep init` writes it anew", stacklevel=2)
        variants = []
    order, runs = {name: number for number, name in enumerate(variants)}, []
    for file in folder.rglob(TRIAL):
        spec = read_spec(file, folder)
        if spec is None:
            name, _, seed = file.parent.relative_to(folder).as_posix().rpartition("/seed-")
            if not seed.isdecimal() or (variants and name not in order):
                continue
            spec = RunSpec(name, int(seed), {})
        runs.append(Run(spec, file.parent, read_result(file.parent)))
    runs.sort(key=lambda run: (run.spec.variant, run.spec.seed))
    return sorted(runs, key=lambda run: order.get(run.spec.variant, len(order)))


def read_spec(file: Path, folder: Path) -> RunSpec | None:
    """What a run of a sweep's folder is, from its ``trial.json``; None, with a warning, if that is
    damaged or of a run that is elsewhere."""

    def check(content: dict[str, Any]) -> None:
        if (spec := as_record(content, RunSpec, TRIAL)) and folder / spec.run != file.parent:
            raise ValueError(f"it is of {spec.run}, which is elsewhere")

    content = read_json(file, check)
    return RunSpec(**content) if content else None


def read_result(directory: Path) -> dict[str, Any]:
    """A run's ``result.json``, empty if it has none, or, with a warning, a damaged one."""
    file = directory / RESULT
    try:
        stamp = file.stat()
    except OSError:
        return {}
    return _result(file, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(4096)  # drivers look again and again
def _result(file: Path, *stamp: int) -> dict[str, Any]:
    return read_json(file, check_result)


NUMBER = (int, float, type(None))
KINDS: dict[tuple[type, ...], str] = {
    NUMBER: "validation_loss validation_perplexity train_loss tokens_per_second",
    (int, float): "seconds training_flops_per_token",
    (int,): "seed steps skipped_steps tokens parameters kv_cache_bytes_per_token sequence_length "
    "peak_memory_bytes world_size",
    (str,): f"variant device torch finished {DIVERGED}",
    (dict,): "evaluation loss_by_position hyper_parameters",
}


def check_result(content: dict[str, Any]) -> None:
    """Raises what `load_json` expects unless this may be the content of a ``result.json``."""
    content["validation_loss"]
    for kinds, keys in KINDS.items():
        for key in keys.split():
            if key in content and type(content[key]) not in kinds:
                raise TypeError(f"{key} is {content[key]!r}")
    datetime.fromisoformat(content.get("finished", "2026-01-01"))
    for key, value in content.get("evaluation", {}).items():
        if type(value) not in NUMBER:
            raise TypeError(f"{key} is {value!r}")
    for curve in content.get("loss_by_position", {}).values():
        if len([*map(round, curve["position"])]) != len([*map(type, curve["loss"])]):
            raise ValueError("loss_by_position has lists of different lengths")


def metric_value(result: dict[str, Any], metric: str, run: str) -> float:
    """The metric of a finished run, from its result or the evaluation in it; NaN for null. An
    `InputError` if the ``run`` has no such number."""
    known = {**result.get("evaluation", {}), **result}
    if metric not in known or not isinstance(known[metric], int | float | None):
        numbers = [key for key, value in known.items() if type(value) in (int, float)]
        raise InputError(f"metric is {metric!r}, which {run} has not; it has {', '.join(numbers)}")
    return math.nan if known[metric] is None else float(known[metric])
