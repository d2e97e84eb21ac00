"""Blocks of docs/results/imaginary-heads.md."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from study_page import (
    COLORS,
    Contrast,
    Quantity,
    Results,
    Row,
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
MEASURED = {"RoPE++ EC": EC, "RoPE++ EC by fan-in": RULE, "RoPE++ EH": EH}


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
PARAMETERS, FLOPS = ("primary", "parameters", "best"), ("others", "flops", "best")
WIDE = ("primary", "wide", "best")
LOSSES = [
    Contrast("EC and RoPE", EC, ROPE),
    Contrast("EC and RoPE with EC's FLOPs", EC, FLOPS),
    Contrast("half of the heads imaginary and RoPE (a null)", ("others", "split", "best"), ROPE),
    Contrast("imaginary heads only and RoPE (a null)", ("others", "imaginary", "best"), ROPE),
    Contrast("EC, imaginary scores not into q, and EC", ("others", "not-into-q", "best"), EC),
    Contrast("EC, imaginary scores not into k, and EC", ("others", "not-into-k", "best"), EC),
    Contrast("EC, imaginary outputs not into v, and EC", ("others", "not-into-v", "best"), EC),
]
BY_FAN_IN = [
    Contrast("EC by fan-in and EC", RULE, EC),
    Contrast("EC by fan-in and RoPE", RULE, ROPE),
    Contrast("EC by fan-in and RoPE with 2H query heads, EC's parameters and FLOPs", RULE, WIDE),
    Contrast("EC by fan-in and RoPE with EC's parameters", RULE, PARAMETERS),
    Contrast("EC by fan-in and RoPE with EC's FLOPs", RULE, FLOPS),
]


def shares(part: str, cell: str, every: Row) -> list[Contrast]:
    """Half of the projections doubled against none, which has RoPE's recipe, and all of them."""
    return [
        Contrast(
            f"half of the projections doubled and {word}, at EC's {what}",
            (part, f"half-{what.lower()}", cell),
            other,
        )
        for word, others in (("none", (PARAMETERS, FLOPS)), ("all", (every, every)))
        for what, other in zip(("parameters", "FLOPs"), others, strict=True)
    ]


INSIDE, LOOKS = (
    [
        kinds(f"{name}, {title}", what, row)
        for row, name in (("ec", "EC"), ("rule", "EC by fan-in"), ("eh", "EH"))
        for what, title in asked.items()
        if (row, what) != ("ec", "noise_2")  # M3
    ]
    for asked in (
        {
            "noise_1": "loss by noise of 1", "noise_2": "loss by noise of 2",
            "removed": "loss by taking heads out",
        },
        {
            "distance": "distance (tokens)", "entropy": "entropy (nats)",
            "first_token": "share on the first token",
            "same_token": "share on the query's own token",
        },
    )
)  # fmt: skip


def losses(results: Results) -> str:
    """Every model, with what equal tokens leaves unequal."""
    rows = {
        results.titles[variant]: (part, variant, "best")
        for part in ("rope", "ec", "eh", "primary", "others")
        for variant in results.variants(part)
    }
    rows["RoPE++ EC by fan-in"] = RULE
    rows |= {
        f"{results.titles[variant]}, by fan-in": ("others-rule", variant, "rule")
        for variant in results.variants("others-rule")
    }
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
        axis.locator_params(nbins=5)
        axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel="real heads", title=title)
    axes[0].set_ylabel("imaginary heads")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, LOSSES),
    "by_fan_in": lambda results: comparisons(results, BY_FAN_IN),
    "shares": lambda results: comparisons(results, shares("others-rule", "rule", RULE)),
    "shares_searched": lambda results: comparisons(results, shares("others", "best", EC)),
    "kinds": lambda results: comparisons(results, INSIDE),
    "looks": lambda results: comparisons(results, LOOKS),
    "losses": losses,
    "inside": inside,
    "kinds_figure": figure(draw_kinds, "kinds", "Real and imaginary heads of each model"),
    "differences": figure(
        lambda results: draw_paired(results, [*PRIMARY[:2], *LOSSES, *BY_FAN_IN]),
        "differences",
        "Paired differences by seed",
    ),
}
