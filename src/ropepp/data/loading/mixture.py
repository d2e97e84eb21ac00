"""Several corpora mixed in fixed proportions, as a pure function of the number of a sample."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropepp.data.loading.loader import EpochOrder, Rows
from ropepp.data.packing.concat import KEYS, Indices, row_numbers
from ropepp.errors import InputError

MAX_PERIOD = 1 << 16


@dataclass(frozen=True, eq=False)
class MixtureSchedule:
    """Which corpus each sample is from: after any number n of samples, corpus i with share w_i has
    had n w_i of them to within less than one.

    The order repeats after a period of P samples, in which corpus i has P w_i. Inside the period it
    is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): the j-th
    sample of each corpus has a first and a last place, where the corpus has fallen behind by
    1 / (2k - 2), k corpora, and by 1 - 1 / (2k - 2); each place is taken by the earliest last
    place among the samples that may come. No corpus is then ahead or behind by more."""

    counts: tuple[int, ...]  # samples of each corpus in a period
    corpora: NDArray[np.int64]  # (P,) corpus of each place in the period
    earlier: NDArray[np.int64]  # (P,) number of earlier places of the same corpus

    @classmethod
    def of(cls, weights: Sequence[float]) -> "MixtureSchedule":
        """The schedule of these weights, which need not sum to 1.

        Weights are taken as they are written (0.1 is a tenth), and P is their common denominator.
        Where that exceeds 65536, P is 65536 and the shares are rounded to multiples of 1 / P: all
        proportions hold for the rounded ones, which `counts` has. Raises an `InputError` if a
        weight is not above 0, or too small to have a place in the period."""
        counts = _whole_numbers(weights)
        corpora = np.array(_tijdeman(counts), np.int64)
        earlier = np.empty_like(corpora)
        for corpus, count in enumerate(counts):
            earlier[corpora == corpus] = np.arange(count)
        return cls(counts, corpora, earlier)

    def place(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus of the samples from `begin` to `end`, and each one's number in its corpus."""
        period, at = np.divmod(np.arange(begin, end), len(self.corpora))
        corpora = self.corpora[at]
        return corpora, period * np.array(self.counts)[corpora] + self.earlier[at]


class MixtureRows:
    """The rows of several corpora by their names, all of one length, numbered one corpus after
    another; the schedule says in which order samples are taken from them."""

    def __init__(self, parts: Mapping[str, Rows], schedule: MixtureSchedule) -> None:
        self.parts = dict(parts)
        self.length = next(iter(self.parts.values())).length
        self.schedule = schedule
        self.sizes = [len(rows) for rows in self.parts.values()]
        self.begins = np.cumsum([0, *self.sizes])  # of each corpus's numbers

    def __len__(self) -> int:
        return int(self.begins[-1])

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """See `ropepp.data.loading.loader.Rows`. Raises an `IndexError` if there is no such row."""
        out = np.empty((len(KEYS), len(indices), self.length), np.int64)
        for part, at, numbers in self._by_part(indices):
            batch = part.batch(numbers)
            for key, own in zip(KEYS, out, strict=True):
                own[at] = batch[key].numpy()
        return {key: torch.from_numpy(own) for key, own in zip(KEYS, out, strict=True)}

    def num_targets(self, indices: Indices) -> int:
        """Number of targets other than -100 in these rows."""
        return sum(part.num_targets(numbers) for part, _, numbers in self._by_part(indices))

    def in_proportion(self) -> "ChosenRows":
        """Rows in the order of the schedule from the first on, until a corpus has none left."""
        corpora, numbers = self.schedule.place(0, len(self) + 1)
        end = np.argmax(numbers >= np.array(self.sizes)[corpora])
        return ChosenRows(self, (self.begins[corpora] + numbers)[:end])

    def _by_part(self, indices: Indices) -> list[tuple[Rows, NDArray[Any], NDArray[np.int64]]]:
        """Rows of each corpus that has any of these, the places of these, and their numbers."""
        rows = row_numbers(indices, len(self))
        corpora = np.searchsorted(self.begins, rows, side="right") - 1
        found = []
        for corpus, part in enumerate(self.parts.values()):
            at = np.flatnonzero(corpora == corpus)
            if len(at):
                found.append((part, at, rows[at] - self.begins[corpus]))
        return found


class ChosenRows:
    """Some rows of others, by their (N,) numbers in a given order."""

    def __init__(self, rows: Rows, numbers: NDArray[np.int64]) -> None:
        self.rows = rows
        self.numbers = numbers
        self.length = rows.length

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """See `ropepp.data.loading.loader.Rows`."""
        return self.rows.batch(self.numbers[np.asarray(indices)])

    def num_targets(self, indices: Indices) -> int:
        """Number of targets other than -100 in these rows."""
        return self.rows.num_targets(self.numbers[np.asarray(indices)])


class MixtureOrder:
    """Which row each training sample is: the schedule says from which corpus, and each corpus has
    epochs and orders of its own. The first one's are those that it has alone."""

    def __init__(self, mixture: MixtureRows, seed: int) -> None:
        self._mixture = mixture
        self._orders = [EpochOrder(size, seed, stream) for stream, size in enumerate(mixture.sizes)]

    def rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """Row numbers of the samples from `begin` to `end`."""
        corpora, numbers = self._mixture.schedule.place(begin, end)
        rows = np.empty_like(numbers)
        for corpus, order in enumerate(self._orders):
            at = corpora == corpus
            own = numbers[at]  # without a gap
            if len(own):
                rows[at] = self._mixture.begins[corpus] + order.rows(int(own[0]), int(own[-1]) + 1)
        return rows


def _whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each corpus in a period, without a common divisor."""
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"data.corpus has weights {list(weights)}; allowed: numbers above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = min(math.lcm(*(share.denominator for share in shares)), MAX_PERIOD)
    counts = [math.floor(share * period) for share in shares]
    # The largest remainders are rounded up, as many as it takes.
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * period)
    for i in by_remainder[: period - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise InputError(
            f"data.corpus has weights {list(weights)}; each must be at least 1/{MAX_PERIOD} of all"
        )
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)


def _tijdeman(counts: tuple[int, ...]) -> list[int]:
    """The corpora of one period, see `MixtureSchedule`, by whole numbers alone."""
    k, period = len(counts), sum(counts)
    if k == 1:
        return [0] * period
    parts = 2 * k - 2
    # Corpus i is behind by (counts[i] n - period j) / period after n samples of which it had j.
    begins: list[list[tuple[int, int]]] = [[] for _ in range(period + 1)]
    for corpus, count in enumerate(counts):
        for number in range(count):
            first = -(-period * (parts * number + 1) // (parts * count))
            last = -(-period * (parts * number + parts - 1) // (parts * count))
            begins[first].append((last, corpus))
    waiting: list[tuple[int, int]] = []
    order = []
    for n in range(1, period + 1):
        for sample in begins[n]:
            heapq.heappush(waiting, sample)
        order.append(heapq.heappop(waiting)[1])
    return order
