"""``ropepp analyze recall``: accuracy over distance and number of pairs, see
`ropepp.eval.recall`."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ropepp.data.recall.accuracy import RecallCell
from ropepp.eval.analyze.output import COLORS, canvas, require_extras, save
from ropepp.eval.analyze.text import recall_data
from ropepp.eval.recall import recall_accuracy, table
from ropepp.interop.saved import SavedModel

MULTIPLES = (1, 2, 4, 8)  # of the trained length


def analyze(saved: SavedModel, options: Namespace) -> None:
    """The command; see ``ropepp analyze recall --help``."""
    require_extras()
    data = recall_data(saved)
    pairs = options.pairs or [data.pairs]
    lengths = options.lengths or [multiple * data.sequence_length for multiple in MULTIPLES]
    size = data.vocab_size
    cells = recall_accuracy(saved.model, pairs, lengths, options.rows, size, options.seed)
    facts = {
        "model": saved.name,
        "step": saved.step,
        "trained_length": data.sequence_length,
        "trained_pairs": data.pairs,
        "lengths": lengths,
        "rows_of_each_length": options.rows,
        "seed": options.seed,
        "chance": 1 / (size // 3),
    }
    print(f"{saved.name}: trained with {data.pairs} pairs in {data.sequence_length} tokens;")
    print(f"{options.rows} rows of each of {lengths} tokens, chance {facts['chance']:.3f}\n")
    print("pairs     distance   answers   accuracy  95% interval (Wilson)")
    for cell in cells:
        ends = f"{cell.distance_low} to {cell.distance_high}"
        print(
            f"{cell.pairs:>5} {ends:>12} {cell.answers:>9,} {cell.accuracy:>10.4f}"
            f"  {cell.low:.4f} to {cell.high:.4f}"
        )
    print()
    scalars = {
        f"recall/accuracy/{n}_pairs": {c.distance_low: c.accuracy for c in cells if c.pairs == n}
        for n in pairs
    }
    figures = {"recall": lambda path: draw(cells, data.sequence_length, facts["chance"], path)}
    save(options.out, "recall", table(cells), facts, figures, scalars)


def draw(cells: Sequence[RecallCell], trained: int, chance: float, path: Path) -> None:
    """Accuracy over distance, a line for each number of pairs, with intervals."""
    with canvas(path, 10, 6.5) as figure:
        panel = figure.subplots()
        for number, n in enumerate(dict.fromkeys(cell.pairs for cell in cells)):
            own = [cell for cell in cells if cell.pairs == n]
            x = [np.sqrt(cell.distance_low * cell.distance_high) for cell in own]
            mean = np.array([cell.accuracy for cell in own])
            sizes = np.abs(np.array([[cell.low, cell.high] for cell in own]).T - mean)
            panel.errorbar(
                x, mean, sizes, fmt="o-", markersize=8, capsize=5, linewidth=2,
                color=COLORS[number % len(COLORS)], label=f"{n} pairs",
            )  # fmt: skip
        panel.axhline(chance, color="#808080", linestyle=":", linewidth=2, label="chance")
        panel.axvline(trained, color="#808080", linestyle="--", label="trained length")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(0, 1.03)
        panel.set_xlabel("distance of the question from its pair (tokens)")
        panel.set_ylabel("right answers")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
