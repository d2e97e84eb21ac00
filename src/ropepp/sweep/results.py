"""What a report is made of: a sweep's rows, values and comparisons, and numbers as text."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.runs.records import DIVERGED, Run, SweepPlan, metric_value, read_plan, read_runs
from ropepp.statistics import Comparison, Interval, compare


@dataclass(frozen=True)
class VariantResults:
    """A variant: its finished runs, the metric by seed, and how it compares (None if baseline)."""

    variant: str
    name: str
    runs: list[Run]
    values: dict[int, float]
    comparison: Comparison | None

    @property
    def group(self) -> list[float]:
        return list(self.values.values())

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def compared(self) -> Comparison:
        """The comparison; an empty one if this is the baseline."""
        return self.comparison or Comparison(self.variant, (), "no pairs")

    @property
    def verdict(self) -> str:
        if self.comparison is None:
            return "baseline"
        return self.comparison.verdict if self.values else "no result"

    def fact(self, key: str, choose: Callable[[list[Any]], Any] = max) -> Any:
        """One number for a fact that the runs' results hold, None where none does."""
        known = [run.result[key] for run in self.runs if run.result.get(key) is not None]
        return choose(known) if known else None


@dataclass(frozen=True)
class SweepResults:
    """All that a report is made of; ``diverged`` runs are done, but have no number to compare, the
    YAML no longer asks for those ``gone``."""

    folder: Path
    plan: SweepPlan
    rows: list[VariantResults]
    done: list[Run]
    unfinished: list[Run]
    diverged: list[Run]
    unmeasured: list[Run]
    gone: list[Run]

    def row(self, variant: str) -> VariantResults | None:
        return next((row for row in self.rows if row.variant == variant), None)

    def baseline(self, row: VariantResults) -> VariantResults | None:
        """The row that another is compared to."""
        return self.row(self.plan.baseline_of(row.variant))

    @property
    def comparisons(self) -> list[Comparison]:
        return [row.comparison for row in self.rows if row.comparison]

    def name(self, variant: str) -> str:
        return self.plan.display.get(variant, variant)


def load(folder: Path) -> SweepResults:
    """Reads a sweep's runs and compares its variants; raises as `write_report`."""
    plan, found = read_plan(folder), read_runs(folder)
    runs, gone = ([run for run in found if plan.has(run.spec) == has] for has in (True, False))
    done = [run for run in runs if run.done]
    if not done:
        raise InputError(f"{folder} has no finished run of its YAML; `ropepp sweep run` makes them")
    values: dict[str, dict[int, float]] = {name: {} for name in plan.variants}
    diverged, unmeasured = list[Run](), list[Run]()
    for run in done:
        value = metric_value(run.result, plan.metric, run.spec.run)
        if math.isfinite(value):
            values[run.spec.variant][run.spec.seed] = value
        else:
            known = {**run.result.get("evaluation", {}), **run.result}
            never_logged = known[plan.metric] is None and DIVERGED not in run.result
            (unmeasured if never_logged else diverged).append(run)
    compared = compare(values, plan.baseline, plan.baselines)
    rows = []
    for variant in sorted(values, key=lambda name: name != plan.baseline):  # the baseline first
        name, own = plan.display.get(variant, variant), values[variant]
        finished = [run for run in done if run.spec.variant == variant]
        rows.append(VariantResults(variant, name, finished, own, compared.get(variant)))
    unfinished = [run for run in runs if not run.done]
    return SweepResults(folder, plan, rows, done, unfinished, diverged, unmeasured, gone)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """With a typographic minus, and a plus if that is the ``sign``; empty for None."""
    if not value:
        return "" if value is None else "0"
    return f"{value:{sign},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(ends: Interval | None, digits: int) -> str:
    """Both ends with their signs; empty for None."""
    return f"[{', '.join(number(end, digits, '+') for end in ends)}]" if ends else ""


def p_value(p: float | None) -> str:
    """Two significant digits, three behind the point at most."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
