"""Blocks of docs/results/length.md."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from study_page import (
    COLORS,
    Contrast,
    Quantity,
    Results,
    Row,
    comparisons,
    figure,
    loss_table,
    mean_text,
    table,
)

MULTIPLES = ("1x", "2x", "4x", "8x")
OTHER_PAIRS = {f"{n} pairs, {m}": (n, m) for m in ("1x", "4x") for n in ("2", "4", "8")}
METHODS = {"plain": "as trained", "pi": "PI", "ntk": "NTK", "yarn": "YaRN"}
OCTAVES = ("16", "32", "64", "128", "256", "512", "1024")
SOLVED = 0.95


def accuracy(multiple: str, pairs: str = "4", method: str = "plain") -> Quantity:
    path = ("measures", "accuracy", method, pairs, multiple)
    return Quantity(path, margin=0.05, by_flips=True)


def text_loss(span: str, method: str = "plain") -> Quantity:
    # No "not seen" of the excess: 0.02 nats are more than what differs between the variants.
    margin = 0.0 if span == "excess" else 0.02
    return Quantity(("measures", "loss", method, span), margin)


def far(method: str = "plain") -> Quantity:
    """Accuracy of the questions that are further from their pair than any of training."""
    return Quantity(("measures", "far", method), margin=0.05, by_flips=True)


FAR = far()
LOST = Quantity(FAR.path, margin=0.05, by_flips=True, less=accuracy("1x").path)
BEYOND, EXCESS = text_loss("beyond"), text_loss("excess")


def with_rope(title: str, part: str, variant: str, cell: str, what: Quantity) -> Contrast:
    return Contrast(f"{title} and RoPE", (part, variant, cell), (part, "rope", cell), what)


PRIMARY = [
    with_rope("L1: far recall at 4x, EC", "recall", "ec", "fan-in", FAR),
    with_rope("L2: far recall at 4x, EH", "recall", "eh", "fan-in", FAR),
    with_rope("L3: excess of text beyond 1x, EC", "text", "ec", "best", EXCESS),
]
OTHERS = {"alibi": "ALiBi", "nope": "NoPE", "pythia": "Pythia"}
OTHERS_OF = {"recall": {"fope-64": "FoPE"} | OTHERS, "text": {"fope": "FoPE"} | OTHERS}


def theta(results: Results, task: str, own: str, what: Quantity, words: str = "") -> list[Contrast]:
    """With theta 100; ``own`` is the cell of the task's first part."""
    found = [
        with_rope(f"{name}, theta 100{words}", f"{task}-theta", variant, "theta-100", what)
        for variant, name in (("ec", "EC"), ("eh", "EH"))
    ]
    return found + [
        Contrast(
            f"{results.titles[variant]}, theta 100 and 10,000{words}",
            (f"{task}-theta", variant, "theta-100"),
            (task, variant, own),
            what,
        )
        for variant in ("rope", "ec", "eh")
    ]


def others(task: str, own: str, what: Quantity, words: str = "") -> list[Contrast]:
    """Other encodings."""
    return [
        Contrast(f"{name} and RoPE{words}", (f"{task}-others", v, own), (task, "rope", own), what)
        for v, name in OTHERS_OF[task].items()
    ]


def lost_recall(results: Results) -> str:
    found = [
        with_rope(f"{name}, far at 4x less 1x", "recall", v, "fan-in", LOST)
        for v, name in (("ec", "EC"), ("eh", "EH"))
    ]
    found += [
        with_rope(f"{name}, all at {m}", "recall", v, "fan-in", accuracy(m))
        for m in ("1x", "4x")
        for v, name in (("ec", "EC"), ("eh", "EH"))
    ]
    return comparisons(results, found)


def stretched_recall(results: Results) -> str:
    found = [
        with_rope(f"{name}, {METHODS[method]}", "recall", v, "fan-in", far(method))
        for method in ("pi", "ntk", "yarn")
        for v, name in (("ec", "EC"), ("eh", "EH"))
    ]
    return comparisons(results, found)


def theta_recall(results: Results) -> str:
    return comparisons(results, theta(results, "recall", "fan-in", FAR))


def others_recall(results: Results) -> str:
    rope = ("recall", "rope", "fan-in")
    found = [Contrast("EC, today, and RoPE", ("recall-today", "ec", "today"), rope, FAR)]
    return comparisons(results, found + others("recall", "fan-in", FAR))


def exploratory_text(results: Results) -> str:
    """Families: the variants, theta, and other encodings, whose losses are apart too."""
    rope, rule = ("text", "rope", "best"), ("text-rule", "ec", "rule")
    own = [
        with_rope("EH, excess", "text", "eh", "best", EXCESS),
        Contrast("EC by fan-in and RoPE, excess", rule, rope, EXCESS),
        with_rope("EC, loss", "text", "ec", "best", BEYOND),
        with_rope("EH, loss", "text", "eh", "best", BEYOND),
        Contrast("EC by fan-in and RoPE, loss", rule, rope, BEYOND),
        with_rope("EC, today, excess", "text-today", "ec", "today", EXCESS),
        with_rope("EH, today, excess", "text-today", "eh", "today", EXCESS),
    ]
    own += [
        with_rope(f"{name}, {METHODS[method]}, excess", "text", v, "best", what)
        for method, what in ((m, text_loss("excess", m)) for m in ("pi", "ntk", "yarn"))
        for v, name in (("ec", "EC"), ("eh", "EH"))
    ]
    families = {
        "The variants:": own,
        "Theta, excess:": theta(results, "text", "best", EXCESS, ", excess"),
        "Theta, loss:": theta(results, "text", "best", BEYOND, ", loss"),
        "Other encodings, excess:": others("text", "best", EXCESS, ", excess"),
        "Other encodings, loss:": others("text", "best", BEYOND, ", loss"),
    }
    return "\n".join(f"{title}\n\n{comparisons(results, x)}" for title, x in families.items())


def recall_rows(results: Results) -> dict[str, Row]:
    """Every row of recall that has results, by its title."""
    rows = {
        f"{results.titles[variant]}{words}": (part, variant, cell)
        for part, cell, words in (
            ("recall", "fan-in", ""), ("recall-others", "fan-in", ""),
            ("recall-theta", "theta-100", ", theta 100"), ("recall-today", "today", ", today"),
        )
        for variant in results.variants(part)
    }  # fmt: skip
    return {title: row for title, row in rows.items() if results.records(*row)}


def recall_table(results: Results, rows: dict[str, Row]) -> str:
    """Accuracy with 4 pairs in longer rows, and how many seeds solved the task at 1x."""
    lines = []
    for title, row in rows.items():
        own = [list(results.losses(*row, what=accuracy(m)).values()) for m in MULTIPLES]
        solved = sum(value >= SOLVED for value in own[0])
        own.append(list(results.losses(*row, what=FAR).values()))
        lines.append([title, str(len(own[0])), str(solved), *map(mean_text, own)])
    return table(["model", "seeds", "solved 1x", *MULTIPLES, "far at 4x"], lines)


def recall_pairs(results: Results) -> str:
    """Accuracy at 1x and 4x with fewer and more pairs than the 4 of training."""
    asked = {title: accuracy(m, n) for title, (n, m) in OTHER_PAIRS.items()}
    lines = [
        [title, *(mean_text(results.losses(*row, what=what).values()) for what in asked.values())]
        for title, row in recall_rows(results).items()
    ]
    return table(["encoding", *asked], lines)


def by_distance(results: Results, row: Row, multiple: str = "4x") -> dict[int, list[float]]:
    """Accuracy of each run, by the first distance of an octave in which something was asked."""
    found: dict[int, list[float]] = {}
    for record in results.records(*row):
        for low, (right, asked) in record["measures"]["octaves"][multiple].items():
            if asked:
                found.setdefault(int(low), []).append(right / asked)
    return dict(sorted(found.items()))


def recall_distances(results: Results) -> str:
    """Accuracy at 4x by distance, mean over seeds."""
    rows = {title: by_distance(results, row) for title, row in recall_rows(results).items()}
    lows = next(iter(rows.values()), {})
    asked = results.records("recall", "rope", "fan-in")[0]["measures"]["octaves"]["4x"]
    head = [f"{low} to {2 * low - 1} ({asked[str(low)][1]})" for low in lows]
    lines = [[title, *(f"{np.mean(own[low]):.3f}" for low in lows)] for title, own in rows.items()]
    return table(["encoding", *head], lines)


def stretched(what: Callable[[str], Quantity], part: str, cell: str) -> Callable[[Results], str]:
    """A table of the methods, of variants that they fit."""

    def block(results: Results) -> str:
        variants = ("rope", "ec", "eh")
        lines = [
            [words, *(mean_text(results.losses(part, v, cell, what(m)).values()) for v in variants)]
            for m, words in METHODS.items()
        ]
        return table(["method", *(results.titles[v] for v in variants)], lines)

    return block


def text_table(part: str) -> Callable[[Results], str]:
    """Loss within and beyond the trained length."""

    def block(results: Results) -> str:
        spans = {
            "Within 256 tokens": text_loss("within"),
            "Beyond": BEYOND,
            "Beyond, in windows of 256": Quantity(("measures", "window")),
            "Excess": EXCESS,
        }
        tables = [
            f"{title}:\n\n" + loss_table(results, part, what=what) for title, what in spans.items()
        ]
        return "\n".join(tables)

    return block


def draw_recall(results: Results) -> Any:
    """Accuracy over the row's length: a point a seed, a line through the means."""
    rows = recall_rows(results)
    main = {name: row for name, row in rows.items() if row[0] in ("recall", "recall-others")}
    others = {name: row for name, row in rows.items() if row[0] != "recall-others"}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, shown, title in zip(
        axes, (main, others), ("4 pairs", "theta and recipe"), strict=True
    ):
        for number, (name, (part, variant, cell)) in enumerate(shown.items()):
            color = COLORS.get(variant, f"C{number}")
            style = {"recall-theta": "--", "recall-today": ":"}.get(part, "-")
            own = [
                list(results.losses(part, variant, cell, accuracy(m)).values()) for m in MULTIPLES
            ]
            x = np.arange(len(MULTIPLES)) + 0.03 * (number - len(shown) / 2)
            for at, values in zip(x, own, strict=True):
                axis.plot([at] * len(values), values, ".", color=color, ms=3, alpha=0.5)
            means = [np.mean(values) for values in own]
            axis.plot(x, means, style, color=color, lw=1.5, label=name)
        axis.set_xticks(range(len(MULTIPLES)), MULTIPLES)
        axis.set_xlabel("row length over the trained length")
        axis.set_title(title)
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0].set_ylabel("right answers")
    return fig


def draw_distances(results: Results) -> Any:
    """Accuracy over the distance at 4 times the trained length: a line a seed, a thick one for the
    mean; a panel a model, so that those that did not solve the task are seen."""
    shown = [("recall", v, "fan-in") for v in ("rope", "ec", "eh")]
    fig, axes = plt.subplots(1, len(shown), figsize=(11, 3.8), sharey=True)
    for axis, row in zip(axes, shown, strict=True):
        found = by_distance(results, row)
        x, y = [1.41 * low for low in found], np.array(list(found.values()))
        if found:
            axis.plot(x, y, color=COLORS[row[1]], lw=0.6, alpha=0.6)
            axis.plot(x, y.mean(1), "o-", color=COLORS[row[1]], lw=2.5)
        axis.set_xscale("log", base=2)
        axis.axvline(64, color="#808080", ls="--", lw=1)
        axis.set_title(results.titles[row[1]])
        axis.set_xlabel("distance to the pair (tokens)")
    axes[0].set_ylabel("right answers in rows of 256")
    return fig


def draw_text(results: Results) -> Any:
    """Loss by position, and what is lost by reading on, as trained and stretched."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    x = [1.41 * float(octave) for octave in OCTAVES]
    shown = [("text", v, "best", results.titles[v]) for v in results.variants("text")]
    shown += [("text-others", v, "best", name) for v, name in OTHERS_OF["text"].items()]
    for number, (part, variant, cell, name) in enumerate(shown):
        if results.records(part, variant, cell):
            y = [mean(results, (part, variant, cell), text_loss(octave)) for octave in OCTAVES]
            axes[0].plot(x, y, "o-", ms=3, color=COLORS.get(variant, f"C{number}"), label=name)
    axes[0].set_xscale("log", base=2)
    axes[0].axvline(256, color="#808080", ls="--", lw=1)
    axes[0].set_xlabel("position in the document (tokens)")
    axes[0].set_ylabel("loss (nats per token)")
    for number, variant in enumerate(results.variants("text")):
        for at, method in enumerate(METHODS):
            own = results.losses("text", variant, "best", text_loss("excess", method)).values()
            place = at + 0.2 * (number - 1)
            color, label = COLORS[variant], results.titles[variant] if at == 0 else None
            axes[1].plot([place] * len(own), list(own), ".", color=color, ms=4, alpha=0.5)
            axes[1].plot(place, np.mean(list(own)), "_", color=color, ms=14, mew=3, label=label)
    axes[1].set_xticks(range(len(METHODS)), METHODS.values())
    axes[1].axhline(0, color="black", lw=1)
    axes[1].set_ylabel("excess by reading on beyond 256 tokens (nats)")
    for axis in axes:
        axis.legend(fontsize=7)
    return fig


def mean(results: Results, row: tuple[str, str, str], what: Quantity) -> float:
    return float(np.mean(list(results.losses(*row, what=what).values())))


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "lost_recall": lost_recall,
    "stretched_recall": stretched_recall,
    "theta_recall": theta_recall,
    "others_recall": others_recall,
    "exploratory_text": exploratory_text,
    "recall_lengths": lambda results: recall_table(results, recall_rows(results)),
    "recall_pairs": recall_pairs,
    "recall_distances": recall_distances,
    "recall_stretched": stretched(far, "recall", "fan-in"),
    "text_stretched": stretched(lambda method: text_loss("excess", method), "text", "best"),
    "text": text_table("text"),
    "text_rule": text_table("text-rule"),
    "text_others": text_table("text-others"),
    "text_theta": text_table("text-theta"),
    "text_today": text_table("text-today"),
    "distances_figure": figure(draw_distances, "distances", "Accuracy of recall over distance"),
    "recall_figure": figure(draw_recall, "recall", "Accuracy of recall over length"),
    "text_figure": figure(draw_text, "text", "Loss of text by position"),
}
