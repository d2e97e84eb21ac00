"""A sweep's YAML: what it may say, and the rows and runs that follow from it.

Files in ``base`` and in values are relative to the YAML; ``logs`` is relative to the working
directory, as everything that ``fit`` writes. Reading needs neither torch nor Optuna.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from ropepp.errors import InputError
from ropepp.files import check_name
from ropepp.runs import settings
from ropepp.runs.config import AnyText, RunsConfig, Whole, read_config
from ropepp.runs.records import RunSpec, SweepPlan

LEARNING_RATE, MAX_STEPS, CORPUS = "model.optimizer.lr", "trainer.max_steps", "data.corpus"
METRICS = ("validation_loss", "validation_perplexity", "train_loss")
MAX_RUNS = 10_000
PRUNERS = ("none", "median", "hyperband")
SEEDS = "a list of different whole numbers from 0 on"
METRIC_RULE = f"{', '.join(METRICS)}, validation.../loss"
PRUNER_RULE = f"{', '.join(PRUNERS)}, or name and options"


@dataclass(frozen=True)
class SweepRow:
    """A row of the table: runs of a ``variant`` of the YAML that differ in their seed alone.
    ``asked`` are keys of ``fit`` besides ``base`` and ``set``, with files read."""

    name: str
    variant: str
    asked: dict[str, Any]
    display: str

    @property
    def values(self) -> str:
        """The end of its name, which says the values of the axes and of a sampler."""
        return self.name.removeprefix(self.variant)

    def with_values(self, values: Mapping[str, Any], raw: Mapping[str, Any]) -> "SweepRow":
        """The row that differs in some keys; ``raw`` has the values as they are to be named."""
        names = settings.short_names(list(values))
        pairs = [(names[key], settings.label(raw[key])) for key in values]
        name = self.name + "".join(f"-{key}={value}" for key, value in pairs)
        display = self.display + "".join(f", {key} {value}" for key, value in pairs)
        return SweepRow(name, self.variant, self.asked | dict(values), display)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RunsConfig):
    """A sweep as its YAML asks for it (docs/sweeps.md), as far checked as possible without fit."""

    question: AnyText = ""
    axes: Annotated[dict, "keys of fit and lists of values"] = field(default_factory=dict)
    seeds: Annotated[list[int], SEEDS] = field(default_factory=lambda: [0, 1, 2])
    baseline: AnyText = ""
    controls: Annotated[list[str], "a list of variants"] = field(default_factory=list)
    metric: Annotated[str, METRIC_RULE] = METRICS[0]
    sampler: Annotated[Literal["grid", "random", "tpe"], "grid, random, tpe"] = "grid"
    trials: Whole = 0
    search: Annotated[dict, "keys of fit and ranges"] = field(default_factory=dict)
    pruner: Annotated[str | dict, PRUNER_RULE] = PRUNERS[0]

    placeholders = ("python", "args", "gpus")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        self._check_keys()
        self._check_overlaps()
        self._check_together()

    @property
    def pruner_options(self) -> dict[str, Any]:
        return {"name": self.pruner} if isinstance(self.pruner, str) else self.pruner

    @cached_property
    def rows(self) -> list[SweepRow]:
        """All variants with all combinations of the axes."""
        folder, rows = self.file.parent, []
        for variant, given in self.variants.items():
            own = dict(given or {})
            display = own.pop("display", variant)
            row = SweepRow(variant, variant, settings.read_files(own, folder), display)
            for values in itertools.product(*self.axes.values()):
                raw = dict(zip(self.axes, values, strict=True))
                rows.append(row.with_values(settings.read_files(raw, folder), raw))
        return rows

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What may not change once a sweep has begun: its rows would not be comparable."""
        return {
            "base": self.read_base(),
            "set": settings.read_files(self.set, self.file.parent),
            "metric": self.metric,
            "search": self.search,
        }

    def read_base(self) -> list[Any]:
        """Content of the base files as they are now."""
        return [settings.read_settings(self.file.parent / file) for file in self.base]

    def drawn(self, row: SweepRow, params: Mapping[str, Any]) -> SweepRow:
        """The row that a sampler's values make of ``row``."""
        values = {key: rounded(params[key], how) for key, how in self.search.items()}
        return row.with_values(values, values)

    def flat(self, row: SweepRow) -> dict[str, Any]:
        """All settings of a row that the YAML or the base configuration gives."""
        own = settings.parents_first(self.fixed["set"] | row.asked)
        return settings.overlay([*self.fixed["base"], own])

    def settings(self, row: SweepRow) -> dict[str, Any]:
        """What tells a row from others, short names to plain values, as its runs have them."""
        flat, names = self.flat(row), settings.short_names(list(settings.flatten(row.asked)))
        values = {name: flat[key] for key, name in names.items()}
        return {k: json.dumps(v) if isinstance(v, list) else v for k, v in values.items()}

    def plan(self, drawn: Sequence[SweepRow] = ()) -> SweepPlan:
        """The content of ``sweep.json``."""
        rates = {self.flat(row).get(LEARNING_RATE) for row in self.rows}
        searched = any(settings.canonical(key) == LEARNING_RATE for key in self.search)
        rows = [*self.rows, *drawn]
        wanted = self.baseline or rows[0].variant
        own = {r.name.removeprefix(wanted): r for r in self.rows if wanted in (r.name, r.variant)}
        baseline = next(iter(own.values()))
        # The baseline at the same values of the axes, behind which stand those that were drawn.
        pairs = [(row, own[max(filter(row.values.startswith, own), key=len)]) for row in rows]
        return SweepPlan(
            name=self.name,
            question=self.question,
            baseline=baseline.name,
            metric=self.metric,
            shared_learning_rate=len(rates) == 1 and not searched,
            variants=[row.name for row in rows],
            display={row.name: row.display for row in rows},
            # At other values than the baseline's they are no controls.
            controls=[
                a.name for a, b in pairs if a.variant in self.controls and a.values == b.values
            ],
            baselines={a.name: b.name for a, b in pairs if b not in (a, baseline)},
            seeds=self.seeds,
        )

    def arguments(self, spec: RunSpec) -> list[str]:
        return [
            *self.configs(self.base),
            f"--experiment={self.name}",
            f"--run={spec.run}",
            f"--logs={self.logs}",
            "--resume=auto",
            *self.flags(spec.overrides),
            f"--seed_everything={spec.seed}",
        ]

    def _check_values(self) -> None:
        """What a type alone does not say."""
        self.check_seeds("seeds", self.seeds)
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            self.refuse(f"seeds is {self.seeds}; allowed: {SEEDS}")
        # With a slash: of one of the evaluation sets. What is compared must be better if smaller.
        metric = self.metric
        if metric not in METRICS and not re.fullmatch(r"validation.*/(loss|perplexity)", metric):
            self.refuse(f"metric is {metric!r}; allowed: {METRIC_RULE}")
        if self.pruner_options.get("name") not in PRUNERS:
            self.refuse(f"pruner is {self.pruner!r}; allowed: {PRUNER_RULE}")

    def _check_keys(self) -> None:
        """What names keys of ``fit``."""
        self.check_fit_keys("axes", self.axes)
        self.check_fit_keys("search", self.search)
        for name, own in self.variants.items():
            if not isinstance(display := (own or {}).get("display", ""), str):
                self.refuse(f"variants.{name}.display is {display!r}; allowed: text")
        for key, values in self.axes.items():
            if not isinstance(values, list) or not values:
                self.refuse(f"axes.{key} is {values!r}; allowed: a list of at least one value")
        for key, how in self.search.items():
            if not isinstance(how, dict) or not (is_range(how) or is_choice(how)):
                self.refuse(
                    f"search.{key} is {how!r}; allowed: low and high, with log: true (low above 0) "
                    "or a step, or choices, a list of plain values"
                )

    def _check_overlaps(self) -> None:
        """Refuses what axes or search and another part set: a row's name would say but one of it.
        They may change what is in a file of a variant, and what is set for all runs."""
        axes = {k: settings.read_files(values, self.file.parent) for k, values in self.axes.items()}
        parts = {f"variants.{name}": own or {} for name, own in self.variants.items()}
        inner = tuple(f"{settings.canonical(key)}." for key in axes)  # which set would change
        parts["set"] = {k: self.set[k] for k in self.set if settings.canonical(k).startswith(inner)}
        named = {f"axes.{key}": said(key, values) for key, values in axes.items()}
        named |= {f"search.{key}": said(key, ()) for key in self.search}
        others = {f"{at}.{k}": said(k, [v]) for at, own in parts.items() for k, v in own.items()}
        for one, other in itertools.product(named, named | others):
            if one != other and (twice := named[one] & (named | others)[other]):
                self.refuse(f"{one} and {other} both set {min(twice)}: leave one of them")

    def _check_together(self) -> None:
        """What depends on several keys."""
        runs = len(self.variants) * len(self.seeds) * prod(map(len, self.axes.values()))
        if runs > MAX_RUNS:
            self.refuse(
                f"it has {runs:,} runs (variants, axes, seeds); allowed: up to {MAX_RUNS:,}"
            )
        names = Counter(row.name for row in self.rows)
        for name, times in names.items():
            if times > 1:
                self.refuse(f"two rows would have the name {name!r}: their values look alike")
            check_name(name, f"{self.file}: the name of a row")
        if self.baseline and self.baseline not in (*self.variants, *names):
            self.refuse(f"baseline is {self.baseline!r}; allowed: {', '.join(self.variants)}")
        self.check_variants("controls", self.controls)
        if self.sampler == "grid":
            if self.search or self.trials or self.pruner != PRUNERS[0]:
                self.refuse(
                    "search, trials and pruner need sampler: random or tpe; a grid has axes"
                )
        elif not self.search or self.trials < 1:
            self.refuse(f"sampler {self.sampler} needs search, and trials of at least 1")


def load(file: Path) -> SweepConfig:
    """Reads a sweep's YAML; an `InputError` if it is missing or says what is not allowed."""
    if not file.is_file():
        raise InputError(f"{file} is neither a sweep's YAML nor the folder of one")
    return read_config(SweepConfig, file, settings.read_yaml(file), file=file)


def said(key: str, values: Iterable[Any]) -> set[str]:
    """What ``key`` sets where it has one of the ``values``, as canonical keys."""
    return {settings.canonical(key)}.union(*(settings.flatten({key: value}) for value in values))


def rounded(value: Any, how: Mapping[str, Any]) -> Any:
    """A drawn value with four digits, so that its name says all of it."""
    if not isinstance(value, float) or "step" in how or "choices" in how:
        return value
    return min(max(float(f"{value:.4g}"), how["low"]), how["high"])


def is_range(how: Mapping[str, Any]) -> bool:
    """Whether this says between which numbers to search."""
    ends = [how.get("low"), how.get("high"), how.get("step", 1)]
    if not {*how} <= {"low", "high", "step", "log"} or not isinstance(how.get("log", True), bool):
        return False
    if any(type(end) not in (int, float) or not abs(end) < 1e300 for end in ends):
        return False
    low, high, step = ends
    return low < high and step > 0 and not (how.get("log") and ("step" in how or low <= 0))


def is_choice(how: Mapping[str, Any]) -> bool:
    """Whether this says among which plain values to search."""
    if {*how} != {"choices"} or not isinstance(values := how["choices"], list):
        return False
    plain = (isinstance(x, str | int | float) and not settings.names_file(x) for x in values)
    return bool(values) and all(plain)
