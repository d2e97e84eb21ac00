"""Blocks of docs/results/early-gap.md."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ropepp.statistics import sample_sd, t_interval
from study_page import (
    COLORS,
    Contrast,
    Results,
    Row,
    cells,
    comparisons,
    cost_table,
    draw_paired,
    figure,
    mean_text,
    paired,
    signed,
    table,
)

PRIMARY = [
    Contrast(
        "P1: EC, RoPE, each at its best recipe", ("final", "ec", "best"), ("final", "rope", "best")
    ),
    Contrast(
        "P2: EH, RoPE, each at its best recipe", ("final", "eh", "best"), ("final", "rope", "best")
    ),
    Contrast(
        "P3: phases 0, 0 and EC, both today", ("today", "twice", "today"), ("today", "ec", "today")
    ),
]
EXPLORATORY = [
    Contrast("EC, RoPE, both today", ("today", "ec", "today"), ("today", "rope", "today")),
    Contrast("EH, RoPE, both today", ("today", "eh", "today"), ("today", "rope", "today")),
    Contrast("RoPE, best and today", ("final", "rope", "best"), ("today", "rope", "today")),
    Contrast("EC, best and today", ("final", "ec", "best"), ("today", "ec", "today")),
    Contrast("EH, best and today", ("final", "eh", "best"), ("today", "eh", "today")),
    Contrast(
        "phases 0, 90 and EC (a null), today",
        ("today", "plus90", "today"),
        ("today", "ec", "today"),
    ),
    Contrast(
        "phases -45, 45 and EC (a null), today",
        ("today", "plus-minus45", "today"),
        ("today", "ec", "today"),
    ),
    Contrast(
        "EC, RoPE's best recipe by fan-in, and EC's own best",
        ("rule", "ec", "fan-in"),
        ("final", "ec", "best"),
    ),
    Contrast(
        "EH, RoPE's best recipe by heads per projection, and EH's own best",
        ("rule", "eh", "fan-in"),
        ("final", "eh", "best"),
    ),
    Contrast(
        "EC, RoPE's best recipe as it is, and EC's own best",
        ("rule", "ec", "as-it-is"),
        ("final", "ec", "best"),
    ),
    Contrast(
        "EC by fan-in, RoPE at its best",
        ("rule", "ec", "fan-in"),
        ("final", "rope", "best"),
    ),
    Contrast(
        "EH by heads per projection, RoPE at its best",
        ("rule", "eh", "fan-in"),
        ("final", "rope", "best"),
    ),
    Contrast(
        "RoPE unclipped and clipped, today",
        ("unclipped", "rope", "today"),
        ("today", "rope", "today"),
    ),
    Contrast(
        "EC unclipped and clipped, today", ("unclipped", "ec", "today"), ("today", "ec", "today")
    ),
    Contrast(
        "RoPE unclipped and clipped, smaller",
        ("unclipped", "rope", "smaller"),
        ("unclipped", "rope", "smaller-clipped"),
    ),
    Contrast(
        "EC unclipped and clipped, smaller",
        ("unclipped", "ec", "smaller"),
        ("unclipped", "ec", "smaller-clipped"),
    ),
]


def recipes(results: Results) -> str:
    """The best six cells of each variant, mean over the seeds that they have."""
    study = results.study
    keys = {long: short for short, long in study.content["keys"].items()}
    lines = []
    for variant in results.variants("search"):
        found: dict[str, list[float]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for (part, row, seed), record in study.records.items():
            name, _, cell = row.partition("_")
            if part.startswith("search") and name == variant:
                found.setdefault(cell, []).append(study.loss(part, row, seed))
                own = record["trial"]["overrides"]
                settings[cell] = {keys[key]: own[key] for key in own if key in keys}
        ranked = sorted(found, key=lambda cell: (-len(found[cell]), np.mean(found[cell])))
        for cell in ranked[:6]:
            asked = [f"{settings[cell][key]:g}" for key in ("std", "step", "lr")]
            seeds = [str(len(found[cell])), mean_text(found[cell])]
            lines.append([results.titles[variant], *asked, *seeds])
    head = ["variant", "deviation", "step", "learning rate", "seeds", "validation loss"]
    return table(head, lines)


def costs(results: Results) -> str:
    """What equal tokens leaves unequal."""
    rows: dict[str, Row] = {
        f"{results.titles[variant]}, {cell}": (part, variant, cell)
        for variant in ("rope", "ec", "eh", "twice")
        for part, cell in (("today", "today"), ("final", "best"))
    }
    return cost_table(results, rows, ("parameters", "training FLOPs/token"))


def gap(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean difference at the seeds of both, with its 95% interval from two seeds on."""
    differences = paired(one, other)
    if not differences:
        return ""
    mean, sd = float(np.mean(differences)), sample_sd(differences)
    if not sd:
        return signed(mean)
    low, high = t_interval(mean, sd, len(differences))
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def longer(results: Results) -> str:
    """Losses after 0.3, 1, 3 and 10 million tokens, and the gap to RoPE at the same recipe."""
    lines = []
    for size in ("0.3M", "1M", "3M", "10M"):
        part = "longest" if size == "10M" else "longer"
        for recipe in ("today", "best"):
            cell = f"{recipe}-{size}"
            found = {v: results.losses(part, v, cell) for v in ("rope", "ec", "eh")}
            if not found["rope"]:
                continue
            gaps = [gap(found[variant], found["rope"]) for variant in ("ec", "eh")]
            means = [mean_text(own.values()) for own in found.values()]
            lines.append([recipe, size, str(len(found["rope"])), *means, *gaps])
    head = ["recipe", "tokens", "seeds", "RoPE", "EC", "EH", "EC - RoPE", "EH - RoPE"]
    return table(head, lines)


def longest(results: Results) -> str:
    """Against RoPE at the better of its two recipes, which after 3 million tokens is today's."""
    found = [
        Contrast(f"{name}, and RoPE today, after {size} tokens", (part, variant, cell), rope)
        for name, variant, cell, part, size in (
            ("EC at its best", "ec", "best-3M", "longer", "3M"),
            ("EH today", "eh", "today-3M", "longer", "3M"),
            ("EC at its best", "ec", "best-10M", "longest", "10M"),
        )
        for rope in [(part, "rope", f"today-{size}")]
    ]
    return comparisons(results, found)


def unclipped(results: Results) -> str:
    """The gap with and without clipping at the same seeds."""
    lines = []
    for recipe, cell, part in (
        ("today", "today", "unclipped"),
        ("today, clipped", "today", "today"),
        ("smaller", "smaller", "unclipped"),
        ("smaller, clipped", "smaller-clipped", "unclipped"),
    ):
        seeds = results.losses("unclipped", "rope", "today")
        rope, ec = (
            {seed: x for seed, x in results.losses(part, variant, cell).items() if seed in seeds}
            for variant in ("rope", "ec")
        )
        means = [mean_text(rope.values()), mean_text(ec.values())]
        lines.append([recipe, str(len(rope)), *means, gap(ec, rope)])
    return table(["recipe", "seeds", "RoPE", "EC", "EC - RoPE"], lines)


def clipping(results: Results) -> str:
    """By how much clipping to norm 1 shortened gradients, mean over logged steps and seeds."""
    lines = []
    for part, cell in (("today", "today"), ("final", "best")):
        for variant in ("rope", "ec", "eh"):
            norms = [
                norm
                for record in results.records(part, variant, cell)
                for norm in record["curve"]["train/grad_norm"]
                if norm
            ]
            if norms:
                factors = np.minimum(1.0, 1.0 / np.array(norms))
                shown = [f"{np.mean(factors < 1):.0%}", f"{factors.mean():.3f}"]
                title = f"{results.titles[variant]}, {cell}"
                lines.append([title, *shown, f"{factors.min():.3f}"])
    return table(["variant, recipe", "clipped share of steps", "mean factor", "smallest"], lines)


def draw_doses(results: Results) -> Any:
    """Loss over the deviation, the step, and both."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    for axis, kind, label in zip(
        axes, ("std", "step", "both"), ("initial deviation", "step", "step, deviation its root"),
        strict=True,
    ):  # fmt: skip
        for variant, color in COLORS.items():
            points = []
            for cell in [*results.cells("table"), "std-1"]:
                prefix, _, text = cell.partition("-")
                if prefix == kind or cell == "std-1":
                    own = list(results.losses("table", variant, cell).values())
                    if own:
                        dose = 1.0 if cell == "std-1" else float(text)
                        points.append((max(dose, 0.04), np.mean(own), sample_sd(own) or 0.0))
            points = sorted(set(points))
            if points:
                x, y, sd = zip(*points, strict=True)
                axis.errorbar(x, y, sd, color=color, marker="o", ms=4, lw=1.3, capsize=2,
                              label=results.titles[variant])  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"{label}, relative")
        places = (
            (0.04, 0.125, 0.25, 0.5, 1, 2) if kind == "std" else (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
        )
        axis.set_xticks(places, ["0" if x == 0.04 else f"{Fraction(x)}" for x in places])
    axes[0].set_ylabel("validation loss (nats per token)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=6, fontsize=9,
               bbox_to_anchor=(0.5, 1.02), frameon=False)  # fmt: skip
    return fig


def draw_curves(results: Results) -> Any:
    """Training loss over steps, mean and deviation over seeds, today and at the best recipe."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    for axis, part, cell, title in zip(
        axes, ("today", "final"), ("today", "best"),
        ("today: one deviation, one step", "each at its best recipe"), strict=True,
    ):  # fmt: skip
        for variant in ("rope", "ec", "eh", "twice"):
            curves = [r["curve"] for r in results.records(part, variant, cell)]
            if len(curves) < 2:
                continue
            losses = np.array([curve["train/loss"] for curve in curves], dtype=float)
            mean, sd, steps = losses.mean(0), losses.std(0, ddof=1), curves[0]["step"]
            axis.plot(steps, mean, color=COLORS[variant], label=results.titles[variant], lw=1.5)
            axis.fill_between(steps, mean - sd, mean + sd, color=COLORS[variant], alpha=0.2, lw=0)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("training loss (nats per token)")
    return fig


def draw_differences(results: Results) -> Any:
    return draw_paired(results, [EXPLORATORY[0], EXPLORATORY[1], *PRIMARY])


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, EXPLORATORY),
    "recipes": recipes,
    "costs": costs,
    "deviation": cells("table", "std"),
    "step": cells("table", "step"),
    "both": cells("table", "both"),
    "rules": cells("rules"),
    "rule": cells("rule"),
    "longer": longer,
    "longest": longest,
    "clipping": clipping,
    "unclipped": unclipped,
    "differences": figure(draw_differences, "differences", "Paired differences by seed"),
    "curves": figure(draw_curves, "curves", "Training loss over steps"),
    "doses": figure(draw_doses, "doses", "Loss over start and step"),
}
