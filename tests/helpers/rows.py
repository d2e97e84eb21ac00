"""Rows that say which ones they are, and batches of them."""

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ropepp.data.loading.loader import TrainLoader


class NumberRows:
    """Row r holds r as its inputs and has r % 3 targets of 2."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        number = torch.from_numpy(np.asarray(indices))[:, None].expand(-1, 2).clone()
        targets = torch.where(torch.arange(2) < number % 3, number, -100)
        zeros = torch.zeros_like(number)
        return {
            "input_ids": number,
            "targets": targets,
            "document_ids": zeros,
            "positions": torch.arange(2).repeat(len(number), 1),
        }

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        return sum(int(row) % 3 for row in indices)


def take(loader: TrainLoader, count: int) -> list[dict[str, Any]]:
    """The next batches over as many passes as it takes, as Lightning asks for them."""
    passes = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return list(itertools.islice(passes, count))


def row_numbers(batch: dict[str, Any]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        assert all(
            torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left
        )
