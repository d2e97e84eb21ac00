"""Rows of an evaluation, and the tables that are made of them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

NLL = "answer nll/token"


@dataclass(frozen=True)
class Score:
    """One number of one model."""

    model: str  # its name in tables
    suite: str  # perplexity, short, ruler or babilong
    task: str  # or text, or group of tasks
    length: int | None  # of the context or window, in tokens
    metric: str  # what the number is; shares of 1 unless it is a perplexity, nats or bits
    value: float
    stderr: float | None  # standard error over items, None if there are fewer than two
    n: int  # items behind it
    baseline: float | None = None  # what guessing gives, if known
    official: bool = True  # False if the task's background text is a substitute

    @property
    def key(self) -> tuple[str, str, int | None, str]:
        """What it has in common with the rows of other models."""
        return self.suite, self.task, self.length, self.metric

    @property
    def is_share(self) -> bool:
        """Whether tables show it in percent."""
        return self.suite != "perplexity" and self.metric != NLL


def mean_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, with n - 1 in the variance; no error of a single value."""
    return ratio_of(values, [1] * len(values))


def ratio_of(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) over independent items, and its standard error by linearisation."""
    n, total = len(sums), math.fsum(counts)
    ratio = math.fsum(sums) / total
    if n < 2:
        return ratio, None
    square = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return ratio, math.sqrt(square * n / (n - 1)) / total


def average(rows: Sequence[Score], task: str, metric: str | None = None) -> Score:
    """The unweighted mean over tasks, whose items are independent; official if all are."""
    first, n = rows[0], len(rows)
    errors = [row.stderr for row in rows if row.stderr is not None]
    baselines = [row.baseline for row in rows if row.baseline is not None]
    return replace(
        first,
        task=task,
        metric=metric or first.metric,
        value=math.fsum(row.value for row in rows) / n,
        stderr=math.hypot(*errors) / n if len(errors) == n else None,
        n=sum(row.n for row in rows),
        baseline=math.fsum(baselines) / n if len(baselines) == n else None,
        official=all(row.official for row in rows),
    )


def markdown(rows: Sequence[Score], notes: Iterable[str]) -> str:
    """A table for each suite, a column for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    lines = ["# Evaluation", ""]
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        lines += [f"## {suite}", "", *_table(own, models), ""]
        if any(not row.official for row in own):
            lines += ["\\* background text that is not the benchmark's own: no official score", ""]
    return "\n".join([*lines, *(f"* {note}" for note in notes)]) + "\n"


def _table(rows: Sequence[Score], models: Sequence[str]) -> list[str]:
    found = {(row.key, row.model): row for row in rows}
    with_length = any(row.length for row in rows)
    with_baseline = any(row.baseline is not None for row in rows)
    header = ["task", *(["length"] if with_length else []), "metric", "items"]
    header += [*(["guessing"] if with_baseline else []), *models]
    marks = ["---" if name in ("task", "metric") else "---:" for name in header]
    lines = [header, marks]
    for key in dict.fromkeys(row.key for row in rows):
        own = [found[key, model] for model in models if (key, model) in found]
        one = own[0]
        cells = [one.task + ("" if all(row.official for row in own) else " \\*")]
        cells += [f"{one.length:,}" if one.length else ""] if with_length else []
        cells += [one.metric, f"{one.n:,}"]
        cells += [_number(one, one.baseline)] if with_baseline else []
        cells += [_cell(found.get((key, model))) for model in models]
        lines.append(cells)
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(row: Score | None) -> str:
    if row is None:
        return ""
    error = _number(row, row.stderr)
    return _number(row, row.value) + (f" ± {error}" if error else "")


def _number(row: Score, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if row.is_share else f"{value:,.3f}"
