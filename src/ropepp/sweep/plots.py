"""Plots of a sweep, as SVG text; matplotlib is imported when they are drawn.

A variant has one colour and line style in all of them, the baseline is black. Lower panels show the
difference to the baseline of the same seed, in which variants come apart that look alike above.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ropepp.errors import optional
from ropepp.runs.records import Run, SweepPlan
from ropepp.sweep.results import SweepResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Floats = NDArray[np.float64]
Seeds = dict[int, tuple[Floats, Floats]]  # x and y of each
Curves = dict[str, Seeds]  # of each variant

# Okabe and Ito's palette, which the colour-blind can tell apart; its yellow is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))  # when the colours have run out
BASELINE, GREY = "#000000", "#b8b8b8"
WIDTH = 5.4  # inches: type of 9 points stays legible on a phone
MOST_BANDS = 5  # variants; more bands on top of each other show nothing
MOST_POINTS = 300
SMOOTHING = 5  # logged points
_LOOK = Path(__file__).with_name("plots.mplstyle")


@dataclass(frozen=True)
class Style:
    """How a variant is drawn."""

    name: str
    color: str
    line: Any = "-"


@dataclass(frozen=True)
class Figure:
    """A finished plot: its SVG document and what a reader must know to read it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Axis:
    """What runs along x: label with unit, whether logarithmic, where the trained length is."""

    label: str
    log: bool = False
    end: float | None = None


# Title, curves, x axis, y label and a note of a plot.
Course = tuple[str, Curves, Axis, str, str]


def styles(sweep: SweepResults) -> dict[str, Style]:
    """The look of each variant, by its name in the sweep."""
    looks = cycle([(color, line) for line in LINES for color in PALETTE])
    return {
        row.variant: Style(row.name, *(next(looks) if row.comparison else (BASELINE, "-")))
        for row in sweep.rows
    }


def figures(sweep: SweepResults, metric: str) -> list[Figure]:
    """All plots for which there are data; ``metric`` is the metric's name with its unit. An
    `InputError` if matplotlib is missing."""
    looks = styles(sweep)
    with optional("matplotlib").rc_context(fname=_LOOK):
        found = [_dots(sweep, looks, metric)]
        if any(one.interval for one in sweep.comparisons):
            found.append(_differences(sweep, looks, metric))
        courses = (course for course in _courses(sweep.done) if course[1])
        found += [_lines(course, looks, sweep.plan) for course in courses]
    return found


def _courses(runs: Sequence[Run]) -> Iterator[Course]:
    tokens = Axis("training tokens")
    loss = "loss (nats per token)"
    late = "The first tenth of the training is left out."
    note = f"Mean of {SMOOTHING} logged steps. {late}"
    yield "Training loss", training_curves(runs, "train/loss", SMOOTHING), tokens, loss, note
    yield "Validation loss", training_curves(runs, "validation/loss"), tokens, loss, late
    lengths = {float(run.result["sequence_length"]) for run in runs}
    end = lengths.pop() if len(lengths) == 1 else None
    for suffix, curves in position_curves(runs).items():
        kind = f" in rows of {suffix[1:-1]} times the trained length" if suffix else ""
        axis = Axis("position in the row (tokens)", log=True, end=end if suffix else None)
        note = "Means over positions, in steps of equal ratio."
        yield f"Loss by position{kind}", curves, axis, loss, note
    for quantity, label in (("loss", loss), ("accuracy", "accuracy (share of right tokens)")):
        curves = length_curves(runs, quantity)
        axis = Axis("length of the rows (tokens)", True, end)
        yield f"{quantity.capitalize()} by length", curves, axis, label, ""


def training_curves(runs: Sequence[Run], key: str, smoothing: int = 1) -> Curves:
    """A logged value against tokens, both means of ``smoothing`` points that follow each other."""
    curves: Curves = {}
    for run in runs:
        logged = {line["step"]: line[key] for line in run.metrics() if key in line}
        if logged and run.result["steps"]:
            steps, y = _sorted(logged)
            x = steps * (run.result["tokens"] / run.result["steps"])
            window = np.ones(min(smoothing, len(y)))
            x, y = (np.convolve(values, window / len(window), "valid") for values in (x, y))
            curves.setdefault(run.spec.variant, {})[run.spec.seed] = x, y
    return curves


def position_curves(runs: Sequence[Run]) -> dict[str, Curves]:
    """Loss against the position, from 1, of the rows of trained length, "", and of the longest."""
    found: dict[str, Curves] = {}
    for run in runs:
        for suffix, table in run.result.get("loss_by_position", {}).items():
            x, loss = (np.array(table[key], dtype=float) for key in ("position", "loss"))
            curve = x[np.isfinite(loss)] + 1, loss[np.isfinite(loss)]
            found.setdefault(suffix, {}).setdefault(run.spec.variant, {})[run.spec.seed] = curve
    longest = max(found, key=lambda suffix: set_length(suffix, 1) or 0, default="")
    return {suffix: found[suffix] for suffix in dict.fromkeys(("", longest)) if suffix in found}


def length_curves(runs: Sequence[Run], quantity: str) -> Curves:
    """``loss`` or ``accuracy`` against the length of the evaluated rows, if there are several."""
    curves: Curves = {}
    for run in runs:
        points = {}
        for key, value in run.result.get("evaluation", {}).items():
            match = re.fullmatch(rf"validation(\w*)/{quantity}", key)
            length = set_length(match[1], run.result["sequence_length"]) if match else None
            if length is not None:
                points[length] = value
        if len(points) > 1:
            curves.setdefault(run.spec.variant, {})[run.spec.seed] = _sorted(points)
    return curves


def _sorted(points: Mapping[int, float]) -> tuple[Floats, Floats]:
    x, y = np.array(sorted(points.items()), dtype=float).T
    return x, y


def set_length(suffix: str, trained: int) -> int | None:
    """Tokens in the rows of an evaluation set: "" as trained, "_2x" twice as many; else None."""
    match = re.fullmatch(r"(?:_(\d+)x)?", suffix)
    return trained * int(match[1] or 1) if match else None


def _aligned(series: Seeds) -> tuple[Floats, Floats]:
    """x that all seeds have, thinned out, and (seeds, x) values."""
    x = reduce(np.intersect1d, (xs for xs, _ in series.values()))
    if len(x) > MOST_POINTS:
        x = x[np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).astype(int))]
    return x, np.array([ys[np.searchsorted(xs, x)] for xs, ys in series.values()])


def _paired(own: Seeds, reference: Seeds) -> Seeds:
    """Differences of two variants' curves, by seed."""
    found = {}
    for seed in own.keys() & reference.keys():
        x, (mine, other) = _aligned({0: own[seed], 1: reference[seed]})
        found[seed] = x, mine - other
    return found


def _lines(course: Course, looks: Mapping[str, Style], plan: SweepPlan) -> Figure:
    title, curves, axis, ylabel, note = course
    curves = {name: curves[name] for name in looks if name in curves}
    gaps = {
        name: gap
        for name, own in curves.items()
        if name != plan.baseline and (gap := _paired(own, curves.get(plan.baseline_of(name), {})))
    }
    panels = 2 if gaps else 1
    longest = max(len(looks[name].name) for name in curves)
    rows = -(-len(curves) // max(1, min(4, 76 // (longest + 10))))  # 76 characters in a line
    canvas, axes = _canvas(0.9 + 1.75 * panels + 0.19 * rows, panels)
    repeated = any(len(own) > 1 for own in curves.values())
    bands = repeated and len(curves) <= MOST_BANDS
    _panel(axes[0], curves, looks, axis, bands)
    axes[0].set_ylabel(ylabel)
    if gaps:
        axes[1].axhline(0, color=BASELINE, linewidth=1)
        _panel(axes[1], gaps, looks, axis, bands)
        axes[1].set_ylabel(f"minus {'baseline' if plan.baselines else looks[plan.baseline].name}")
    axes[-1].set_xlabel(axis.label)
    caption = (
        "Means over seeds." if repeated else "One seed.",
        "Bands from the lowest to the highest seed." if bands else "",
        "Below: the difference to the baseline of the same seed." if gaps else "",
        "Dotted: the trained length." if axis.end else "",
        note,
    )
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=-(-len(curves) // rows))
    return Figure(title, " ".join(filter(None, caption)), _svg(canvas))


def _panel(
    panel: "Axes", curves: Curves, looks: Mapping[str, Style], axis: Axis, bands: bool
) -> None:
    """Draws means over seeds."""
    from matplotlib.ticker import EngFormatter

    for name, series in curves.items():
        x, values = _aligned(series)
        if not len(x):
            continue
        shown = axis.log | (x >= x.max() / 10)
        x, values = x[shown], values[:, shown]
        style, mean = looks[name], values.mean(axis=0)
        marker = "o" if len(x) <= 12 else ""
        panel.plot(
            x, mean, color=style.color, linestyle=style.line, label=style.name, marker=marker
        )
        if bands and len(values) > 1:
            bottom, top = values.min(axis=0), values.max(axis=0)
            panel.fill_between(x, bottom, top, color=style.color, alpha=0.15, linewidth=0)
    if axis.log:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
        panel.minorticks_off()
    else:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
    if axis.end:
        panel.axvline(axis.end, color=GREY, linestyle=":", linewidth=1.2)


def _dots(sweep: SweepResults, looks: Mapping[str, Style], metric: str) -> Figure:
    shown = [row for row in sweep.rows if row.values]
    canvas, (panel,) = _canvas(1.0 + 0.36 * max(2, len(shown)))
    for seed in sorted({seed for row in shown for seed in row.values}):
        line = [(row.values[seed], at) for at, row in enumerate(shown) if seed in row.values]
        panel.plot(*zip(*line, strict=True), color=GREY, linewidth=0.8, zorder=1)
    for at, row in enumerate(shown):
        points, color = list(row.values.values()), looks[row.variant].color
        panel.plot(points, [at] * len(points), "o", color=color, markersize=5, alpha=0.75)
        panel.plot(np.mean(points), at, "|", color=color, markersize=17, mew=2.2)
    _names(panel, [row.name for row in shown], metric)
    caption = (
        "A dot a run, bars at the means; grey lines join the runs of a seed: where they run "
        "parallel, pairing by seed takes noise out of the comparison."
    )
    return Figure(f"All runs: {metric}", caption, _svg(canvas))


def _differences(sweep: SweepResults, looks: Mapping[str, Style], metric: str) -> Figure:
    shown = {one.variant: one for one in sweep.comparisons if one.mean is not None}
    canvas, (panel,) = _canvas(1.0 + 0.36 * max(2, len(shown)))
    panel.axvline(0, color=BASELINE, linewidth=1)
    for row, (name, one) in enumerate(shown.items()):
        for ends, width in ((one.simultaneous, 1.1), (one.interval, 3.2)):
            if ends:
                panel.plot(ends, [row, row], color=looks[name].color, linewidth=width)
        panel.plot(one.mean or 0.0, row, "o", color=looks[name].color, markersize=6)
    _names(panel, [looks[name].name for name in shown], f"difference in {metric}")
    caption = (
        "Mean difference to the baseline over pairs of equal seed. Thick: 95% interval; thin: the "
        "interval that allows for all comparisons of the sweep at once."
    )
    return Figure("Differences to the baseline", caption, _svg(canvas))


def _names(panel: "Axes", names: Sequence[str], xlabel: str) -> None:
    panel.set_xlabel(xlabel)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)


def _canvas(height: float, panels: int = 1) -> "tuple[Canvas, list[Axes]]":
    # Without pyplot there is no window and no global list of figures.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    axes = canvas.subplots(panels, sharex=True, squeeze=False)
    return canvas, [row[0] for row in axes]


def _svg(canvas: "Canvas") -> str:
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
