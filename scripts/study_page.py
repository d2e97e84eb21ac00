"""The tables and figures of a study's page.

Blocks between marks in its Markdown file are made anew; the words around them are people's.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ropepp.files import write_text
from ropepp.statistics import holm, sample_sd, sign_flip_p, t_interval

if TYPE_CHECKING:
    from study import Study

MARKS = re.compile(r"(<!-- make (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_SEEN = 0.02  # nats; the 90% interval must lie within plus and minus this


class Results:
    """Losses and curves of a study by part, variant, cell and seed."""

    def __init__(self, study: "Study") -> None:
        self.study = study
        self.titles = {
            name: own.get("display", name) for name, own in study.content["variants"].items()
        }

    def losses(self, part: str, variant: str, cell: str) -> dict[int, float]:
        """Finite final losses by seed."""
        row = f"{variant}_{cell}"
        found = {
            seed: self.study.loss(part, row, seed)
            for (own, name, seed) in self.study.records
            if own == part and name == row
        }
        return {seed: loss for seed, loss in sorted(found.items()) if math.isfinite(loss)}

    def records(self, part: str, variant: str, cell: str) -> list[dict[str, Any]]:
        row = f"{variant}_{cell}"
        return [r for (p, name, _), r in self.study.records.items() if (p, name) == (part, row)]

    def cells(self, part: str) -> list[str]:
        """Names of a part's cells, in the YAML's order, as far as there are results."""
        names = [key[1].split("_", 1)[1] for key in self.study.records if key[0] == part]
        known = {**self.study.parts[part].get("cells", {})}
        return [cell for cell in known if cell in names] or list(dict.fromkeys(names))

    def variants(self, part: str) -> list[str]:
        return list(self.study.parts[part]["variants"])


def mean_text(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    given = list(values)
    if not given:
        return ""
    sd = sample_sd(given)
    mean = sum(given) / len(given)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences, one minus other, at the seeds of both."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def t_test_p(differences: list[float]) -> float:
    """Two-sided p of the paired t-test."""
    from scipy.stats import t

    sd = sample_sd(differences)
    assert sd
    statistic = np.mean(differences) / (sd / math.sqrt(len(differences)))
    return float(2 * t.sf(abs(statistic), len(differences) - 1))


def verdict(p_holm: float, mean: float, sd: float, n: int) -> str:
    """The page's words, by its rules."""
    low, high = t_interval(mean, sd, n)
    if p_holm < 0.05 and not low <= 0 <= high:
        return "shown: " + ("lower" if mean < 0 else "higher")
    low, high = t_interval(mean, sd, n, 0.10)
    return "not seen" if low > -NOT_SEEN and high < NOT_SEEN else "undecided"


def comparisons(results: Results, named: list[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> str:
    """A table of paired differences; Holm's correction over its rows."""
    rows = [(title, paired(results.losses(*a), results.losses(*b))) for title, a, b in named]
    rows = [(title, differences) for title, differences in rows if len(differences) > 2]
    adjusted = holm([t_test_p(differences) for _, differences in rows])
    lines = [
        "| comparison | pairs | mean difference | 95% interval | 90% interval | p (Holm) "
        "| p (sign flips) | verdict |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    for (title, differences), p in zip(rows, adjusted, strict=True):
        n, mean, sd = len(differences), float(np.mean(differences)), sample_sd(differences)
        assert sd is not None
        wide, narrow = t_interval(mean, sd, n), t_interval(mean, sd, n, 0.10)
        flips = sign_flip_p(differences)
        cells = [
            title, str(n), signed(mean), f"{signed(wide[0])} to {signed(wide[1])}",
            f"{signed(narrow[0])} to {signed(narrow[1])}", f"{p:.2g}",
            "" if flips is None else f"{flips:.2g}", verdict(p, mean, sd, n),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loss_table(results: Results, part: str, cells: list[str] | None = None) -> str:
    """Cells down, variants across, mean and deviation over seeds."""
    variants = results.variants(part)
    chosen = cells or results.cells(part)
    head = ["cell", "seeds", *(results.titles[v] for v in variants)]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: |" + " ---: |" * len(variants)]
    for cell in chosen:
        found = [results.losses(part, variant, cell) for variant in variants]
        if not any(found):
            continue
        n = sorted({len(own) for own in found})
        seeds = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
        row = [cell, seeds, *(mean_text(own.values()) for own in found)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def write_page(study: "Study") -> Path:
    """Brings the page's tables and figures in step with the results."""
    import importlib

    page = study.store.parent.with_suffix(".md")
    blocks: dict[str, Callable[[Results], str]] = importlib.import_module(
        f"study_{study.name.replace('-', '_')}"
    ).BLOCKS
    results = Results(study)

    def made(match: re.Match[str]) -> str:
        return match[1] + blocks[match[2]](results) + match[3]

    write_text(page, MARKS.sub(made, page.read_text()))
    write_text(study.store.with_suffix(".csv"), runs_csv(study))
    return page


def runs_csv(study: "Study") -> str:
    """One line a run."""
    keys = ("validation_loss", "train_loss", "steps", "tokens", "parameters",
            "training_flops_per_token", "seconds", "commit", "device", "torch")  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("part", "row", "seed", *keys))
    for (part, row, seed), record in study.records.items():
        writer.writerow((part, row, seed, *(record["result"].get(key) for key in keys)))
    return out.getvalue()
