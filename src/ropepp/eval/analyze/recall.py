"""``ropepp analyze recall``: recall by distance and number of pairs, see `ropepp.data.recall`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ropepp.data.recall.accuracy import STREAM, RecallCell, count, distances, octaves, to_cells
from ropepp.data.recall.task import RecallRows
from ropepp.errors import InputError
from ropepp.eval.analyze.output import COLORS, canvas, draw_intervals, save
from ropepp.eval.analyze.rows import BATCH_TOKENS, recall_data
from ropepp.interop.saved import SavedModel
from ropepp.model.transformer import Transformer
from ropepp.train.evaluation import model_inputs

MULTIPLES = (1, 2, 4, 8)  # of the trained length


@torch.no_grad()
def recall_accuracy(
    model: Transformer,
    pairs: Sequence[int],
    lengths: Sequence[int],
    rows: int = 256,
    vocab_size: int | None = None,
    seed: int = 0,
) -> list[RecallCell]:
    """Accuracy of the answers by number of pairs and octave of distances. An `InputError` if a
    number does not fit the others.

    There are ``rows`` of each length and number of pairs, none of them of training or validation,
    with as many token ids as the model's unless given. Rows of all lengths are pooled. Answers of a
    row are not quite independent, as Wilson's interval takes them to be.
    """
    size = vocab_size or model.config.vocab_size
    if size > model.config.vocab_size:
        raise InputError(f"vocab_size is {size}; the model has {model.config.vocab_size} ids")
    made = {
        (n, T): RecallRows(T, n, size, rows, None, seed, STREAM) for n in pairs for T in lengths
    }
    bins, device = octaves(max(lengths)), model.embed_tokens.weight.device
    cells = []
    for n in pairs:
        sums = torch.zeros(2, bins, dtype=torch.float64)
        for T in lengths:
            step = max(1, BATCH_TOKENS // T)
            for start in range(0, rows, step):
                batch = made[n, T].batch(range(start, min(start + step, rows)))
                batch = {key: value.to(device) for key, value in batch.items()}
                _, hits = model.evaluate(*model_inputs(batch))
                sums += count(hits, model.local_part(distances(batch, n)), bins).cpu()
        cells += to_cells(sums, n)
    return cells


def analyze(saved: SavedModel, options: Namespace) -> None:
    """The command; see ``ropepp analyze recall --help``."""
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
    save(options.out, "recall", list(map(asdict, cells)), facts, figures, scalars)


def draw(cells: Sequence[RecallCell], trained: int, chance: float, path: Path) -> None:
    """Accuracy over distance, a line for each number of pairs, with intervals."""
    with canvas(path, 10, 6.5) as figure:
        panel = figure.subplots()
        for number, n in enumerate(dict.fromkeys(cell.pairs for cell in cells)):
            own = [cell for cell in cells if cell.pairs == n]
            x = np.sqrt([cell.distance_low * cell.distance_high for cell in own])
            draw_intervals(
                panel, x, list(map(asdict, own)), ("accuracy", "low", "high"), fmt="o-",
                color=COLORS[number % len(COLORS)], label=f"{n} pairs",
            )  # fmt: skip
        panel.axhline(chance, color="#808080", linestyle=":", linewidth=2, label="chance")
        panel.axvline(trained, color="#808080", linestyle="--", label="trained length")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(xlabel="distance of the question from its pair (tokens)", ylim=(0, 1.03))
        panel.set_ylabel("right answers")
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
