"""Right answers of associative recall by distance and number of pairs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STREAM = 1 << 32  # of the evaluation's rows: no training or validation rows are made of it
NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclass(frozen=True)
class RecallCell:
    """Accuracy of the answers at some distances, among some number of pairs."""

    pairs: int  # in a row
    distance_low: int  # smallest between a question and its pair's key, in tokens
    distance_high: int
    answers: int  # number of questions
    hits: int  # number of right answers
    accuracy: float
    low: float  # of Wilson's 95% interval
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


def count(hits: Tensor, far: Tensor, bins: int) -> Tensor:
    """(2, bins) float64: right answers and answers in each octave of distances; of (B, T) whether
    the likeliest token is the target, and (B, T) the `distances`, where 0 counts nothing."""
    far = far.flatten()
    octave = far.clamp(min=1).float().log2().floor().long()
    asked = (far > 0).float()
    sums = torch.zeros(2, bins, device=far.device)
    for own, values in zip(sums, (hits.flatten() * asked, asked), strict=True):
        own.index_add_(0, octave, values)
    return sums.double() if far.device.type != "mps" else sums


def to_cells(sums: Tensor, pairs: int) -> list[RecallCell]:
    """The octaves with answers, of what `count` counts, summed over batches."""
    found = []
    for octave, (hits, answers) in enumerate(sums.T.round().long().tolist()):
        if answers:
            low, high = 1 << octave, (2 << octave) - 1
            share = hits / answers
            found.append(RecallCell(pairs, low, high, answers, hits, share, *wilson(hits, answers)))
    return found
