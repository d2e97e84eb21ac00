"""Rows to batches for any number of processes, with one number as the only state.

Training samples are numbered through all epochs: 0, 1, 2, ... Optimizer step s takes the next
`global_batch_size` of them, whatever the number of processes and the size of a micro-batch, and a
run that stops after n samples goes on with sample n.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropepp.data.packing.concat import IGNORE_INDEX, PADDING_DOCUMENT
from ropepp.errors import InputError

# What a row that is there for its shape alone holds: padding has no target, nobody sees it.
FILLER = {"input_ids": 0, "targets": IGNORE_INDEX, "document_ids": PADDING_DOCUMENT, "positions": 0}


class Rows(Protocol):
    """A finite set of rows; each must depend on its number alone."""

    length: int  # tokens in a row (T)

    def __len__(self) -> int:
        """Number of rows."""

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """The rows of these (B,) numbers: int64 (B, T) of each of `KEYS`, in new memory."""

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Number of targets other than -100 in these rows."""


class Order(Protocol):
    """Which row each training sample is; a pure function of the sample's number."""

    def rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """(end - begin,) row numbers of the samples from `begin` to `end`."""


class EpochOrder:
    """Sample g is row `permutation(epoch g // R)[g % R]` of R rows: every epoch has each row once.
    Orders of one seed, at least 0, and different streams have nothing in common."""

    def __init__(self, size: int, seed: int = 0, stream: int = 0) -> None:
        self.size = size
        # A step may span two epochs. Orders are large: each keeps its own, and no other's out.
        make = partial(permutation, seed, size=size, stream=stream)
        self._permutation = lru_cache(maxsize=2)(make)

    def rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """Row numbers of samples begin to end; more than one epoch where the rows are few."""
        size, parts = self.size, []
        for epoch in range(begin // size, (end - 1) // size + 1):
            order = self._permutation(epoch)
            parts.append(order[max(begin - epoch * size, 0) : end - epoch * size])
        return np.concatenate(parts)


@dataclass(eq=False)
class TrainLoader:
    """Micro-batches of one process, without end over the epochs, resumable after any of them.

    An order says which row each sample is, and a global batch may span two epochs. Micro-batch m of
    step s on rank r takes the samples from
    `s * global_batch_size + (m * world_size + r) * micro_batch_size` on.

    Every batch is `rows.batch(...)` with two plain integers: `num_targets`, the targets in the
    whole global batch of its step, over all ranks and micro-batches; and `samples`, the state once
    all ranks have had this micro-batch.

    `seconds_waited` is the time that the making of batches has kept the run waiting.

    One pass of `iter` ends at the next multiple of `len` micro-batches since sample 0; the next
    pass goes on there.

    `num_workers` threads make the same batches ahead of time; 0 makes them when asked. Without an
    `order` it is the `EpochOrder` of seed 0. Raises an `InputError` if the micro-batches do not
    make up the global batch."""

    rows: Rows
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    order: Order | None = None
    seconds_waited: float = field(default=0.0, init=False)
    _samples: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        size, together = self.global_batch_size, self.micro_batch_size * self.world_size
        if size < 1 or size % together:
            below = size // together * together
            fitting = [str(size) for size in (below, below + together) if size > 0]
            raise InputError(
                f"global_batch_size is {size}; with micro_batch_size {self.micro_batch_size} and"
                f" world_size {self.world_size} it must be a multiple of {together}:"
                f" {' or '.join(fitting)}"
            )
        self._order = self.order or EpochOrder(len(self.rows))

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step on each process."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        """Micro-batches of a process in an epoch, its last step completed from the next epoch."""
        return math.ceil(len(self.rows) / self.global_batch_size) * self.accumulation

    def state_dict(self) -> dict[str, int]:
        """The samples that all processes together have had."""
        return {"samples": self._samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after that many samples; the number of processes and the micro-batch may have
        changed. Raises an `InputError` if the state lies where no micro-batch here begins."""
        samples, together = state["samples"], self.micro_batch_size * self.world_size
        if samples < 0 or samples % self.global_batch_size % together:
            raise InputError(
                f"samples is {samples}; inside a step of global_batch_size"
                f" {self.global_batch_size} it must be a multiple of {together}"
                f" (micro_batch_size x world_size)"
            )
        self._samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size, together = self.global_batch_size, self.micro_batch_size * self.world_size
        epoch = len(self) * together
        counts = range(self._samples, (self._samples // epoch + 1) * epoch, together)
        step, num_targets = -1, 0
        batches = self._batches(counts)
        for before in counts:
            start = time.perf_counter()
            batch = next(batches)
            if before // size != step:
                step = before // size
                rows = self._order.rows(step * size, (step + 1) * size)
                num_targets = self.rows.num_targets(rows)
            self.seconds_waited += time.perf_counter() - start
            # Before the batch is handed out: whoever has a batch has consumed it.
            self._samples = before + together
            yield {**batch, "num_targets": num_targets, "samples": self._samples}

    def _batches(self, counts: range) -> Iterator[dict[str, Tensor]]:
        begins = (before + self.rank * self.micro_batch_size for before in counts)
        indices = (self._order.rows(begin, begin + self.micro_batch_size) for begin in begins)
        if self.num_workers == 0:
            yield from map(self.rows.batch, indices)
            return
        with ThreadPoolExecutor(self.num_workers) as pool:
            made = (pool.submit(self.rows.batch, own) for own in indices)
            waiting = deque(islice(made, 2 * self.num_workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(islice(made, 1))


@dataclass(eq=False)
class EvalLoader:
    """All rows, or the first `limit`, once and in order; every process gets the same number of
    batches.

    Batch b on rank r takes the rows from `(b * world_size + r) * micro_batch_size` on. Beyond the
    last row come rows of padding without targets, so that no process ends before another."""

    rows: Rows
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        self.total = min(len(self.rows), self.limit or len(self.rows))

    def __len__(self) -> int:
        return math.ceil(self.total / (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in range(len(self)):
            begin = (number * self.world_size + self.rank) * self.micro_batch_size
            indices = np.arange(begin, begin + self.micro_batch_size)
            # A row that exists gives a filler its shape.
            batch = self.rows.batch(np.minimum(indices, self.total - 1))
            if indices[-1] >= self.total:
                beyond = torch.from_numpy(indices >= self.total)
                for key, value in FILLER.items():
                    batch[key][beyond] = value
            yield batch


def permutation(seed: int, epoch: int, size: int, stream: int = 0) -> NDArray[np.int64]:
    """(size,) the order of the rows in an epoch; read-only. It sorts raw numbers of the generator,
    whose stream numpy promises to keep in all versions, unlike `Generator.permutation`."""
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    keys = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(size)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
