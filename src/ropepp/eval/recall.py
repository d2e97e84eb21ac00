"""How often a model recalls, by distance and number of pairs (`ropepp.data.recall`)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ropepp.data.recall.accuracy import STREAM, RecallCell, count, distances, octaves, to_cells
from ropepp.data.recall.task import RecallRows
from ropepp.errors import InputError
from ropepp.model.transformer import Transformer

BATCH_TOKENS = 1 << 13


@torch.no_grad()
def recall_accuracy(
    model: Transformer,
    pairs: Sequence[int],
    lengths: Sequence[int],
    rows: int = 256,
    vocab_size: int | None = None,
    seed: int = 0,
) -> list[RecallCell]:
    """Accuracy of the answers by number of pairs and octave of distances.

    Rows of all lengths are pooled: the long ones have far questions, the short ones near questions
    in numbers that suffice. Answers of a row are not quite independent, as Wilson's interval takes
    them to be.

    Args:
        model: A model trained on associative recall.
        pairs: Numbers of key-value pairs in a row.
        lengths: Tokens in a row.
        rows: Rows of each length and number of pairs.
        vocab_size: Number of token ids in the task; the model's unless given.
        seed: Seed of the rows; none is a row of training or validation.

    Raises:
        InputError: A number does not fit the others.
    """
    if not pairs or not lengths or rows < 1:
        raise InputError(
            f"recall has pairs {list(pairs)}, lengths {list(lengths)} and {rows} rows; at least one"
            " of each is needed"
        )
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
                _, hits = model.evaluate(
                    batch["input_ids"],
                    batch["targets"],
                    batch.get("positions"),
                    batch.get("document_ids"),
                )
                sums += count(hits, model.local_part(distances(batch, n)), bins).cpu()
        cells += to_cells(sums, n)
    return cells


def table(cells: Sequence[RecallCell]) -> list[dict[str, Any]]:
    """The cells as lines of a table."""
    return [asdict(cell) for cell in cells]
