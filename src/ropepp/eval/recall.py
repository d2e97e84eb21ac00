"""How often a model recalls, by distance and number of pairs (`ropepp.data.recall`)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ropepp.data.recall import RecallRows
from ropepp.errors import InputError
from ropepp.model.transformer import Transformer

STREAM = 1 << 32  # of the evaluation's rows: no training or validation rows are made of it
BATCH_TOKENS = 1 << 13
NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclass(frozen=True)
class RecallCell:
    """Accuracy of the answers at some distances, among some number of pairs.

    Attributes:
        pairs: Key-value pairs in a row.
        distance_low: Smallest distance between a question and its pair's key, in tokens.
        distance_high: Largest.
        answers: Number of questions.
        hits: Number of right answers.
        accuracy: Their share.
        low: Lower end of Wilson's 95% interval.
        high: Upper end.
    """

    pairs: int
    distance_low: int
    distance_high: int
    answers: int
    hits: int
    accuracy: float
    low: float
    high: float


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    z2 = NORMAL_95**2
    middle = (hits + z2 / 2) / (n + z2)
    half = NORMAL_95 / (n + z2) * math.sqrt(hits * (n - hits) / n + z2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def octaves(length: int) -> int:
    """Number of octaves 1, 2-3, 4-7, ... of the distances in a row."""
    return max(1, (length - 1).bit_length())


def distances(batch: dict[str, Tensor], pairs: int, ignore_index: int = -100) -> Tensor:
    """(B, T) tokens between a question and the same key in its pair; 0 where nothing is asked."""
    ids, targets = batch["input_ids"], batch["targets"]
    same = ids[:, :, None] == ids[:, None, 0 : 2 * pairs : 2]  # (B, T, pairs)
    place = 2 * same.long().argmax(-1)
    here = torch.arange(ids.shape[1], device=ids.device)
    return (here - place).where(targets != ignore_index, 0)


def count(model: Transformer, batch: dict[str, Tensor], pairs: int, bins: int) -> Tensor:
    """(2, bins) float64: right answers and answers of a batch in each octave of distances.

    Of rows shared by several processes, only the own part. Padding counts nothing.
    """
    ids, targets = batch["input_ids"], batch["targets"]
    _, hits = model.evaluate(ids, targets, batch.get("positions"), batch.get("document_ids"))
    far = model.own(distances(batch, pairs)).flatten()
    octave = far.clamp(min=1).float().log2().floor().long()
    asked = (far > 0).float()
    sums = torch.zeros(2, bins, device=ids.device)
    for own, values in zip(sums, (hits.flatten() * asked, asked), strict=True):
        own.index_add_(0, octave, values)
    return sums.double() if ids.device.type != "mps" else sums


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
                sums += count(model, batch, n, bins).cpu()
        cells += to_cells(sums, n)
    return cells


def to_cells(sums: Tensor, pairs: int) -> list[RecallCell]:
    """The octaves with answers, of what `count` counts, summed over batches."""
    found = []
    for octave, (hits, answers) in enumerate(sums.T.round().long().tolist()):
        if answers:
            low, high = 1 << octave, (2 << octave) - 1
            share = hits / answers
            found.append(RecallCell(pairs, low, high, answers, hits, share, *wilson(hits, answers)))
    return found


def table(cells: Sequence[RecallCell]) -> list[dict[str, Any]]:
    """The cells as lines of a table."""
    return [asdict(cell) for cell in cells]
