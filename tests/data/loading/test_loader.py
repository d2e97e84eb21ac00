import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.corpora import random_documents, write_corpus
from helpers.rows import NumberRows, assert_same, row_numbers, take
from ropepp.data.loading.loader import EpochOrder, EvalLoader, TrainLoader, permutation
from ropepp.data.packing.concat import ConcatRows
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), micro=st.integers(1, 3), groups=st.integers(1, 3))
def test_a_step_has_the_same_samples_at_every_number_of_processes(
    size: int, micro: int, groups: int
) -> None:
    rows, steps, global_size = NumberRows(size), 5, micro * 4 * groups
    found: dict[int, list[list[int]]] = {}
    for world in (1, 2, 4):
        ranks = [
            TrainLoader(rows, global_size, micro, rank, world, order=EpochOrder(size, 3))
            for rank in range(world)
        ]
        batches = [take(loader, steps * loader.accumulation) for loader in ranks]
        found[world] = []
        for step in range(steps):
            part = slice(step * ranks[0].accumulation, (step + 1) * ranks[0].accumulation)
            of_step = [batch for rank in batches for batch in rank[part]]
            numbers = [number for batch in of_step for number in row_numbers(batch)]
            found[world].append(sorted(numbers))
            targets = sum(int((batch["targets"] != -100).sum()) for batch in of_step)
            assert {batch["num_targets"] for batch in of_step} == {targets}
            # A micro-step of all ranks, in the order of ranks, is a stretch of the sample order.
            together = [row_numbers(rank[part][0]) for rank in batches]
            first = step * global_size
            order = [permutation(3, g // size, size)[g % size] for g in range(first, first + 99)]
            assert [n for numbers in together for n in numbers] == order[: micro * world]
    assert found[1] == found[2] == found[4]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), micro=st.integers(1, 4), groups=st.integers(1, 3))
def test_every_epoch_has_each_row_once(size: int, micro: int, groups: int) -> None:
    loader = TrainLoader(NumberRows(size), micro * groups, micro, order=EpochOrder(size, 1))
    batches = take(loader, -(-3 * size // micro))
    numbers = [number for batch in batches for number in row_numbers(batch)]
    for epoch in range(3):
        assert sorted(numbers[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # Fixed for good: another order would change the data of a resumed run.
    assert permutation(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_a_pass_ends_at_a_multiple_of_the_length() -> None:
    loader = TrainLoader(NumberRows(10), global_batch_size=4, micro_batch_size=2)
    assert (loader.accumulation, len(loader)) == (2, 6)
    assert [batch["samples"] for batch in loader] == [2, 4, 6, 8, 10, 12]
    assert loader.state_dict() == {"samples": 12}
    assert len(list(loader)) == 6
    loader.load_state_dict({"samples": 22})
    assert [batch["samples"] for batch in loader] == [24]
    assert len(list(loader)) == 6


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), done=st.integers(0, 25), world=st.sampled_from([1, 2]))
def test_resume_gives_exactly_the_rest(size: int, done: int, world: int) -> None:
    def fresh() -> TrainLoader:
        return TrainLoader(
            NumberRows(size), 8, 2, rank=world - 1, world_size=world, order=EpochOrder(size, 5)
        )

    whole = take(fresh(), done + 12)
    first = fresh()
    take(first, done)
    assert first.state_dict() == {"samples": done * 2 * world}
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert_same(take(second, 12), whole[done:])
    assert all(type(batch["num_targets"]) is int for batch in whole)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 30),
    steps=st.integers(0, 6),
    then=st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 2), (4, 1), (1, 8)]),
)
def test_resume_with_another_number_of_processes_and_micro_batch(
    size: int, steps: int, then: tuple[int, int]
) -> None:
    rows = NumberRows(size)
    before = TrainLoader(rows, 8, 2, rank=1, world_size=2)
    take(before, steps * before.accumulation)
    plain = TrainLoader(rows, 8, 8)
    expected = [sorted(row_numbers(batch)) for batch in take(plain, steps + 3)][steps:]
    world, micro = then
    found: list[list[int]] = [[], [], []]
    for rank in range(world):
        loader = TrainLoader(rows, 8, micro, rank, world)
        loader.load_state_dict(before.state_dict())
        for number, batch in enumerate(take(loader, 3 * loader.accumulation)):
            found[number // loader.accumulation] += row_numbers(batch)
    assert [sorted(numbers) for numbers in found] == expected


def test_resume_where_no_micro_batch_begins() -> None:
    loader = TrainLoader(NumberRows(9), 8, 2, world_size=2)
    loader.load_state_dict({"samples": 12})
    with pytest.raises(InputError, match="samples is 10; inside a step of global_batch_size 8 it"):
        loader.load_state_dict({"samples": 10})


@pytest.fixture(scope="module")
def corpus_rows(tmp_path_factory: pytest.TempPathFactory) -> ConcatRows:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, random_documents(np.random.default_rng(0), 60, 40))
    return ConcatRows(Corpus.open(folder, "train"), 16)


@pytest.mark.slow
def test_workers_change_nothing(corpus_rows: ConcatRows) -> None:
    def fresh(workers: int) -> TrainLoader:
        return TrainLoader(corpus_rows, 12, 3, 1, 2, workers, EpochOrder(len(corpus_rows), 2))

    count = len(fresh(0)) + 7
    whole = take(fresh(0), count)
    before = torch.get_rng_state()
    loader = fresh(2)
    start = take(loader, 5)
    # Batches fetched ahead of the consumer are not consumed.
    assert loader.state_dict() == {"samples": 5 * 6}
    again = fresh(2)
    again.load_state_dict(loader.state_dict())
    assert_same(start + take(again, count - 5), whole)
    assert torch.equal(torch.get_rng_state(), before)


class Damaged(NumberRows):
    """Rows of which one is read from a file that is damaged."""

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        if 7 in indices:
            raise InputError("tokens.bin is damaged")
        return super().batch(indices)


def test_what_is_wrong_ahead_is_said_when_it_is_its_turn() -> None:
    loader = TrainLoader(Damaged(40), 4, 4, num_workers=2, order=_InOrder())
    found = iter(loader)
    assert next(found)["samples"] == 4
    with pytest.raises(InputError, match=r"^tokens\.bin is damaged$"):
        next(found)


class _InOrder:
    def rows(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end)


FAILS = """
import sys
from ropepp.data.loading.loader import TrainLoader
from ropepp.data.packing.concat import Concat
from ropepp.data.tokens.corpus import Corpus
rows = Concat().rows(Corpus.open(sys.argv[1], "train"), 16)
batches = iter(TrainLoader(rows, 8, 8, num_workers=2))
next(batches)
raise SystemExit(3)
"""


@pytest.mark.slow
def test_an_error_is_not_held_up_by_workers(tmp_path: Path) -> None:
    """Whose loader lives until the interpreter ends, as an error's traceback keeps it."""
    folder = write_corpus(tmp_path, random_documents(np.random.default_rng(0), 200, 90))
    command = [sys.executable, "-c", FAILS, str(folder)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, 2), "is 10; with micro_batch_size 4 and world_size 2 .* of 8: 8 or 16"),
        ((4, 4, 0, 2), "is 4; with micro_batch_size 4 and world_size 2 .* multiple of 8: 8"),
        ((0, 4), "global_batch_size is 0"),
    ],
)
def test_sizes_that_do_not_fit(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainLoader(NumberRows(5), *arguments)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 30),
    micro=st.integers(1, 5),
    world=st.integers(1, 5),
    limit=st.none() | st.integers(1, 40),
)
def test_evaluation_covers_all_rows_once(
    size: int, micro: int, world: int, limit: int | None
) -> None:
    rows = NumberRows(size)
    loaders = [EvalLoader(rows, micro, rank, world, limit) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    total = min(size, limit or size)
    assert {len(rank) for rank in batches} == {len(loaders[0])} == {-(-total // (micro * world))}
    numbers = []
    for batch in itertools.chain.from_iterable(zip(*batches, strict=True)):
        assert batch["input_ids"].shape == (micro, 2)
        real = batch["document_ids"][:, 0] >= 0
        numbers += batch["input_ids"][real, 0].tolist()
        fill = {key: value[~real] for key, value in batch.items()}
        assert (fill["input_ids"] == 0).all()
        assert (fill["targets"] == -100).all()
        assert (fill["document_ids"] == -1).all()
        assert (fill["positions"] == 0).all()
    assert numbers == list(range(total))


def test_evaluation_of_a_corpus(memory_corpus: Callable[[Sequence[int]], Corpus]) -> None:
    rows = ConcatRows(memory_corpus([4, 7, 1, 9]), 4)
    batches = [batch for rank in range(2) for batch in EvalLoader(rows, 2, rank, 2)]
    targets = sum(int((batch["targets"] != -100).sum()) for batch in batches)
    assert targets == 3 + 6 + 0 + 8
