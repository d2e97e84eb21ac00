"""Blocks of docs/results/imaginary-heads.md."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from study_page import (
    COLORS,
    Contrast,
    Quantity,
    Results,
    comparisons,
    cost_table,
    draw_paired,
    figure,
    mean_text,
    table,
)

RULE = ("rule", "ec", "rule")
KINDS = ("real", "imaginary")
EC, EH, ROPE = ("ec", "ec", "best"), ("eh", "eh", "best"), ("rope", "rope", "best")
MEASURED = {"RoPE++ EC": EC, "RoPE++ EC by RoPE's recipe and its fan-in": RULE, "RoPE++ EH": EH}


def of(kind: str, what: str) -> Quantity:
    # No margin, so that "not seen" is not said: 0.02 nats are as much as a kind of heads is worth.
    return Quantity(("measures", kind, what), margin=0.0)


def kinds(title: str, what: str, variant: str = "ec") -> Contrast:
    """Imaginary less real heads of the same models."""
    row = {"ec": EC, "eh": EH, "rule": RULE}[variant]
    return Contrast(title, row, row, of("imaginary", what), of("real", what))


PRIMARY = [
    Contrast(
        "M1: EC and RoPE with 2H query heads, EC's parameters and FLOPs",
        EC,
        ("primary", "wide", "best"),
    ),
    Contrast("M2: EC and RoPE with EC's parameters", EC, ("primary", "parameters", "best")),
    kinds("M3: EC, loss by noise of 2 on imaginary and on real heads", "noise_2"),
]
LOSSES = [
    Contrast("EC and RoPE", EC, ROPE),
    Contrast("EC and RoPE with EC's FLOPs", EC, ("others", "flops", "best")),
    Contrast(
        "half of the projections doubled and none, at EC's parameters",
        ("others", "half-parameters", "best"),
        ("primary", "parameters", "best"),
    ),
    Contrast(
        "half of the projections doubled and none, at EC's FLOPs",
        ("others", "half-flops", "best"),
        ("others", "flops", "best"),
    ),
    Contrast(
        "half of the projections doubled and all, at EC's parameters",
        ("others", "half-parameters", "best"),
        EC,
    ),
    Contrast(
        "half of the projections doubled and all, at EC's FLOPs",
        ("others", "half-flops", "best"),
        EC,
    ),
    Contrast("EC by RoPE's recipe and its fan-in, and RoPE", RULE, ROPE),
    Contrast(
        "EC by RoPE's recipe and its fan-in, and RoPE with 2H query heads (M1)",
        RULE,
        ("primary", "wide", "best"),
    ),
    Contrast(
        "EC by RoPE's recipe and its fan-in, and RoPE with EC's parameters (M2)",
        RULE,
        ("primary", "parameters", "best"),
    ),
    Contrast("half of the heads imaginary and RoPE (a null)", ("others", "split", "best"), ROPE),
    Contrast("imaginary heads only and RoPE (a null)", ("others", "imaginary", "best"), ROPE),
    Contrast("EC, imaginary scores not into q, and EC", ("others", "not-into-q", "best"), EC),
    Contrast("EC, imaginary scores not into k, and EC", ("others", "not-into-k", "best"), EC),
    Contrast("EC, imaginary outputs not into v, and EC", ("others", "not-into-v", "best"), EC),
]
INSIDE = [
    kinds("EC, loss by noise of 1", "noise_1"),
    kinds("EC, loss by taking heads out", "removed"),
    kinds("EC by RoPE's recipe and its fan-in, loss by noise of 2", "noise_2", "rule"),
    kinds("EC by RoPE's recipe and its fan-in, loss by taking heads out", "removed", "rule"),
    kinds("EH, loss by noise of 2", "noise_2", "eh"),
    kinds("EH, loss by taking heads out", "removed", "eh"),
]
LOOKS = [
    kinds("EC, distance (tokens)", "distance"),
    kinds("EC, entropy (nats)", "entropy"),
    kinds("EC, share on the first token", "first_token"),
    kinds("EC, share on the query's own token", "same_token"),
    kinds("EC by RoPE's recipe and its fan-in, distance (tokens)", "distance", "rule"),
    kinds("EC by RoPE's recipe and its fan-in, entropy (nats)", "entropy", "rule"),
]


def losses(results: Results) -> str:
    """Every model, with what equal tokens leaves unequal."""
    rows = {
        results.titles[variant]: (part, variant, "best")
        for part in ("rope", "ec", "eh", "primary", "others")
        for variant in results.variants(part)
    }
    rows |= {title: row for title, row in MEASURED.items() if row == RULE}
    return cost_table(results, rows, ("parameters", "training FLOPs/token"))


def inside(results: Results) -> str:
    """What each kind of head does, mean and deviation over seeds."""
    columns = {
        "noise_1": "loss by noise of 1", "noise_2": "by noise of 2", "removed": "by taking out",
        "distance": "distance", "entropy": "entropy", "first_token": "first token",
        "same_token": "own token",
    }  # fmt: skip
    lines = [
        [
            f"{title}, {kind}",
            *(mean_text(results.losses(*row, what=of(kind, name)).values()) for name in columns),
        ]
        for title, row in MEASURED.items()
        for kind in KINDS
    ]
    return table(["model, heads", *columns.values()], lines)


def draw_kinds(results: Results) -> Any:
    """Real against imaginary heads of the same model, a point a seed."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    colors = dict(zip(MEASURED, (COLORS["ec"], COLORS["rope-half"], COLORS["eh"]), strict=True))
    titles = {
        "noise_2": "loss by noise of 2 (nats)", "removed": "loss by taking out (nats)",
        "distance": "distance (tokens)",
    }  # fmt: skip
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        ends = []
        for name, row in MEASURED.items():
            x, y = (list(results.losses(*row, what=of(kind, what)).values()) for kind in KINDS)
            axis.plot(x, y, "o", ms=4, color=colors[name], label=name)
            ends += x + y
        low, high = min(ends), max(ends)
        ends = [low - 0.05 * (high - low), high + 0.05 * (high - low)]
        axis.plot(ends, ends, "--", color="#808080", lw=1)
        axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel="real heads", title=title)
    axes[0].set_ylabel("imaginary heads")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, LOSSES),
    "kinds": lambda results: comparisons(results, INSIDE),
    "looks": lambda results: comparisons(results, LOOKS),
    "losses": losses,
    "inside": inside,
    "kinds_figure": figure(draw_kinds, "kinds", "Real and imaginary heads of each model"),
    "differences": figure(
        lambda results: draw_paired(results, [*PRIMARY[:2], *LOSSES]),
        "differences",
        "Paired differences by seed",
    ),
}
