"""Blocks of docs/results/upcycling.md."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

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

ROPE, EC = ("long", "rope", "tokens"), ("long", "ec", "tokens")
LONGER = ("long-flops", "rope", "flops")
PRIMARY = [
    Contrast("U1: as EC and as RoPE, equal tokens", EC, ROPE),
    Contrast("U2: as EC and as RoPE, equal FLOPs", EC, LONGER),
]
SAME_STEP = ("long-step", "ec", "as-rope")
EXPLORATORY = [
    Contrast("as EC with RoPE's step and as RoPE, equal tokens", SAME_STEP, ROPE),
    Contrast("as EC with RoPE's step and as EC, equal tokens", SAME_STEP, EC),
]
ROWS = {
    "as RoPE": ROPE,
    "as EC": EC,
    "as RoPE, EC's FLOPs": LONGER,
    "as EC, RoPE's step": SAME_STEP,
}


def losses(results: Results) -> str:
    """Every continuation, with what it cost."""
    return cost_table(results, ROWS, ("steps", "tokens", "parameters", "training FLOPs"))


def start(results: Results) -> str:
    """What they begin with, in rows of 1,024 tokens."""
    short = ("short", "rope", "best")
    lines = [
        [
            title,
            mean_text(results.losses(*short, what=Quantity(("measures", "loss", key))).values()),
        ]
        for title, key in (("10,000, as trained", "10000"), ("100,000", "100000"))
    ]
    return table(["theta", "validation loss in rows of 1,024 tokens"], lines)


def draw_curves(results: Results) -> Any:
    """Training loss of the continuations less that as RoPE, over steps of the same rows."""
    fig, axis = plt.subplots(figsize=(7, 3.5))
    curves = {
        title: [record["curve"] for record in results.records(*row)] for title, row in ROWS.items()
    }
    losses = {
        title: np.array([curve["train/loss"] for curve in own], dtype=float)
        for title, own in curves.items()
    }
    base, *others = ROWS
    for title in others:
        row, steps = ROWS[title], curves[base][0]["step"]
        gaps = losses[title][:, : len(steps)] - losses[base]
        mean, sd = gaps.mean(0), gaps.std(0, ddof=1)
        style = ":" if title.endswith("step") else "-"
        axis.plot(steps, mean, style, color=COLORS[row[1]], label=title)
        axis.fill_between(steps, mean - sd, mean + sd, color=COLORS[row[1]], alpha=0.15, lw=0)
    axis.axhline(0, color="black", lw=1)
    axis.set_xlabel("optimizer step in rows of 1,024 tokens")
    axis.set_ylabel("training loss less that as RoPE (nats)")
    axis.legend()
    return fig


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, EXPLORATORY),
    "start": start,
    "losses": losses,
    "curves": figure(draw_curves, "curves", "Training loss of the continuations less that as RoPE"),
    "differences": figure(
        lambda results: draw_paired(results, PRIMARY + EXPLORATORY),
        "differences",
        "Paired differences by seed",
    ),
}
