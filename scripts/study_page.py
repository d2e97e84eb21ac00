"""The tables and figures of a study's page.

Blocks between marks in its Markdown file are made anew; the words around them are people's.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from ropepp.errors import InputError
from ropepp.files import write_text
from ropepp.runs.table import markdown_table
from ropepp.statistics import holm, sample_sd, sign_flip_p, t_interval

if TYPE_CHECKING:
    from study import Study

mpl.rcParams.update({"svg.hashsalt": "ropepp", "font.size": 10, "axes.grid": True})
COLORS = {
    "rope": "#0072b2", "ec": "#d55e00", "eh": "#009e73", "twice": "#cc79a7",
    "rope-wide": "#56b4e9", "rope-half": "#e69f00",
}  # fmt: skip
MARKS = re.compile(r"(<!-- make (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Quantity:
    """What a comparison is about.

    Args:
        path: Where a run's record has it.
        margin: "Not seen" asks for a 90% interval between minus and plus this.
        by_flips: Whether sign flips decide: values are bimodal, and a t test is not to be trusted.
        less: Where a run's record has what is to be subtracted, if anything is.
    """

    path: tuple[str, ...] = ("result", "validation_loss")
    margin: float = 0.02
    by_flips: bool = False
    less: tuple[str, ...] | None = None

    def of(self, record: dict[str, Any]) -> float:
        """A run's value; infinity where there is none."""
        value = found(record, self.path)
        return value - found(record, self.less) if self.less else value


def found(record: Any, path: Sequence[str]) -> float:
    """The number at a path of a record; infinity if there is no finite one."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return math.inf if record is None or not math.isfinite(record) else float(record)


LOSS = Quantity()
Row = tuple[str, str, str]  # part, variant, cell


@dataclass(frozen=True)
class Contrast:
    """A comparison of two rows, one minus other, or of two quantities of a row's runs."""

    title: str
    one: Row
    other: Row
    what: Quantity = LOSS
    against: Quantity | None = None  # the other's quantity, if it is not the same

    def differences(self, results: "Results") -> list[float]:
        """By seed, at the seeds of both."""
        own = results.losses(*self.one, self.what)
        return paired(own, results.losses(*self.other, self.against or self.what))


class Results:
    """Losses and curves of a study by part, variant, cell and seed."""

    def __init__(self, study: "Study") -> None:
        self.study = study
        self.titles = {
            name: own.get("display", name) for name, own in study.content["variants"].items()
        }

    def losses(self, part: str, variant: str, cell: str, what: Quantity = LOSS) -> dict[int, float]:
        """Finite values by seed, final losses unless said."""
        row = f"{variant}_{cell}"
        found = {
            seed: what.of(record)
            for (own, name, seed), record in self.study.records.items()
            if own == part and name == row
        }
        return {seed: value for seed, value in sorted(found.items()) if math.isfinite(value)}

    def records(self, part: str, variant: str, cell: str) -> list[dict[str, Any]]:
        row = f"{variant}_{cell}"
        return [
            r
            for (p, name, _), r in sorted(self.study.records.items(), key=itemgetter(0))
            if (p, name) == (part, row)
        ]

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


def p_value(differences: list[float], what: Quantity) -> float:
    """Of the test that decides; 1 where it is that of sign flips and there are too few pairs."""
    if what.by_flips:
        flips = sign_flip_p(differences)
        return 1.0 if flips is None else flips
    return t_test_p(differences)


def t_test_p(differences: list[float]) -> float:
    """Two-sided p of the paired t-test."""
    from scipy.stats import t

    sd, mean = sample_sd(differences), float(np.mean(differences))
    if not sd:  # all equal
        return 0.0 if mean else 1.0
    statistic = mean / (sd / math.sqrt(len(differences)))
    return float(2 * t.sf(abs(statistic), len(differences) - 1))


def interval(mean: float, sd: float, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Student's; the mean alone where all values are equal."""
    return t_interval(mean, sd, n, alpha) if sd else (mean, mean)


def verdict(p_holm: float, mean: float, sd: float, n: int, margin: float = LOSS.margin) -> str:
    """The page's words, by its rules."""
    low, high = interval(mean, sd, n)
    if p_holm < 0.05 and not low <= 0 <= high:
        return "shown: " + ("lower" if mean < 0 else "higher")
    low, high = interval(mean, sd, n, 0.10)
    return "not seen" if low > -margin and high < margin else "undecided"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A block of Markdown; the first ``left`` columns are words."""
    columns, lines = {title: itemgetter(n) for n, title in enumerate(head)}, list(rows)
    return (markdown_table(lines, columns, left) if lines else "No results yet.") + "\n"


def comparisons(results: Results, contrasts: Iterable[Contrast]) -> str:
    """A table of paired differences; Holm's correction over its rows."""
    found = [(contrast, contrast.differences(results)) for contrast in contrasts]
    rows = [(contrast, differences) for contrast, differences in found if len(differences) > 2]
    adjusted = holm([p_value(differences, contrast.what) for contrast, differences in rows])
    cells = []
    for (contrast, differences), p in zip(rows, adjusted, strict=True):
        n, mean, sd = len(differences), float(np.mean(differences)), sample_sd(differences)
        assert sd is not None
        wide, narrow = interval(mean, sd, n), interval(mean, sd, n, 0.10)
        flips = sign_flip_p(differences)
        digits = 3 if max(map(abs, wide)) > 0.005 else 4
        spans = [[signed(end, digits) for end in ends] for ends in (wide, narrow)]
        tests = [f"{p:.2g}", "" if flips is None else f"{flips:.2g}"]
        word = verdict(p, mean, sd, n, contrast.what.margin)
        cells.append(
            [contrast.title, word, str(n), signed(mean, digits), *map(" to ".join, spans), *tests]
        )
    head = ["comparison", "verdict", "pairs", "mean difference", "95% interval", "90% interval"]
    return table([*head, "p (Holm)", "p (sign flips)"], cells, left=2)


def loss_table(
    results: Results, part: str, cells: list[str] | None = None, what: Quantity = LOSS
) -> str:
    """Cells down, variants across, mean and deviation over seeds."""
    variants, rows = results.variants(part), []
    for cell in cells or results.cells(part):
        found = [results.losses(part, variant, cell, what) for variant in variants]
        if any(found):
            n = sorted({len(own) for own in found})
            seeds = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
            rows.append([cell, seeds, *(mean_text(own.values()) for own in found)])
    return table(["cell", "seeds", *(results.titles[v] for v in variants)], rows)


COSTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "steps": lambda result: str(result["steps"]),
    "tokens": lambda result: f"{result['tokens']:,}",
    "parameters": lambda result: f"{result['parameters']:,}",
    "cache (bytes/token)": lambda result: f"{result['kv_cache_bytes_per_token']:,}",
    "training FLOPs/token": lambda result: f"{result['training_flops_per_token']:,.0f}",
    "training FLOPs": lambda result: f"{result['tokens'] * result['training_flops_per_token']:.3g}",
}


def cost_table(results: Results, rows: dict[str, Row], columns: Sequence[str]) -> str:
    """Rows by title: their seeds, what they cost, and the loss."""
    lines = []
    for title, row in rows.items():
        if own := results.records(*row):
            costs = [COSTS[name](own[0]["result"]) for name in columns]
            loss = mean_text(results.losses(*row).values())
            lines.append([title, str(len(own)), *costs, loss])
    return table(["model", "seeds", *columns, "validation loss"], lines)


def cells(part: str, prefix: str = "", what: Quantity = LOSS) -> Callable[[Results], str]:
    """A block: the table of a part's cells that begin like this."""

    def block(results: Results) -> str:
        names = [cell for cell in results.cells(part) if cell.startswith(prefix)]
        return loss_table(results, part, names, what)

    return block


def figure(draw: Callable[[Results], Any], name: str, words: str) -> Callable[[Results], str]:
    """A block: a figure in a file of its own; ``words`` are for who does not see it."""

    def block(results: Results) -> str:
        fig = draw(results)
        folder: Path = results.study.store.parent
        folder.mkdir(exist_ok=True)
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(fig)
        return f"![{words}]({folder.name}/{name}.svg)\n"

    return block


def draw_paired(
    results: Results,
    contrasts: list[Contrast],
    label: str = "difference in validation loss (nats per token), first minus second",
) -> Any:
    """Every seed's difference, the mean and its 95% interval; a line a comparison that has any."""
    contrasts = [own for own in contrasts if len(own.differences(results)) > 1]
    fig, axis = plt.subplots(figsize=(9, 0.7 + 0.5 * len(contrasts)))
    for y, contrast in enumerate(reversed(contrasts)):
        differences = contrast.differences(results)
        mean, sd = float(np.mean(differences)), sample_sd(differences)
        assert sd is not None
        axis.plot(differences, [y - 0.18] * len(differences), "|", color="#888888", ms=7)
        low, high = interval(mean, sd, len(differences))
        axis.plot([low, high], [y, y], color="#0072b2", lw=2.5)
        axis.plot([mean], [y], "o", color="#0072b2")
    axis.set_yticks(range(len(contrasts)), [own.title for own in reversed(contrasts)])
    axis.axvline(0, color="black", lw=1)
    axis.set_xlabel(label)
    return fig


def read_page(study: "Study") -> tuple[Path, str, Any]:
    """A study's page and the module with its blocks; an `InputError` if they do not fit."""
    import importlib

    page, name = study.store.parent.with_suffix(".md"), f"study_{study.name.replace('-', '_')}"
    if not page.is_file():
        raise InputError(f"{page}, whose tables are to be made, is missing")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"scripts/{name}.py, with the blocks of {page}, is missing") from error
    text = page.read_text()
    begun = Counter(mark[2] for mark in MARKS.finditer(text))
    wrong = {
        "missing": module.BLOCKS.keys() - begun.keys(),
        "unknown": begun.keys() - module.BLOCKS.keys(),
        "more than once": {name for name, times in begun.items() if times > 1},
    }
    words = [f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names]
    for mark in ("<!-- make", "<!-- end"):
        if (times := text.count(mark)) != begun.total():
            words.append(f"{times} of {mark} for {begun.total()} blocks")
    if words:
        raise InputError(
            f"{page}: marks do not fit scripts/{name}.py ({'; '.join(words)}); allowed is each of "
            "its blocks once, between <!-- make NAME --> and <!-- end -->"
        )
    return page, text, module


def write_page(study: "Study") -> Path:
    """Brings the page's tables and figures in step with the results."""
    page, text, module = read_page(study)
    blocks: dict[str, Callable[[Results], str]] = module.BLOCKS
    results = Results(study)

    def made(match: re.Match[str]) -> str:
        return match[1] + blocks[match[2]](results) + match[3]

    write_text(page, MARKS.sub(made, text))
    write_text(study.store.with_suffix(".csv"), runs_csv(study, module.PRIMARY))
    return page


def runs_csv(study: "Study", primary: Iterable[Contrast]) -> str:
    """One line a run, with what the primary comparisons are about."""
    asked = {x for one in primary for x in (one.what, one.against) if x and x != LOSS}
    paths = sorted({path for x in asked for path in (x.path, x.less) if path})
    keys = ("validation_loss", "train_loss", "steps", "tokens", "parameters",
            "training_flops_per_token", "seconds", "commit", "device", "torch")  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("part", "row", "seed", *keys, *map("/".join, paths)))
    for (part, row, seed), record in study.records.items():
        values = [found(record, path) for path in paths]
        measured = [value if math.isfinite(value) else "" for value in values]
        writer.writerow((part, row, seed, *(record["result"].get(x) for x in keys), *measured))
    return out.getvalue()
