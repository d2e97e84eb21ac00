import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepp.data.loading.loader import TrainLoader
from ropepp.data.packing.concat import IGNORE_INDEX
from ropepp.data.recall.task import RecallDataModule, RecallRows
from ropepp.errors import InputError

SIZES: dict[str, Any] = {
    "sequence_length": 16,
    "pairs": 3,
    "vocab_size": 20,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "train_rows": 40,
    "validation_rows_per_length": 5,
}
KEYS = ("input_ids", "targets", "document_ids", "positions")


def module(**changes: Any) -> RecallDataModule:
    made = RecallDataModule(**{**SIZES, **changes})
    made.setup("fit")
    return made


@st.composite
def modules(draw: st.DrawFn) -> RecallDataModule:
    """All sizes that fit each other, the tightest among them."""
    pairs = draw(st.integers(1, 5))
    room, reach = draw(st.integers(0, 20)), draw(st.none() | st.integers(0, 30))
    return module(
        pairs=pairs,
        sequence_length=3 * pairs + room,
        vocab_size=draw(st.integers(max(6, 3 * pairs), 40)),
        max_distance=None if reach is None else 3 * pairs - 1 + reach,
        seed=draw(st.integers(0, 3)),
    )


def read(inputs: list[int], targets: list[int], pairs: int, vocab_size: int) -> list[int]:
    """Checks a row token by token; the distances of its questions in their order."""
    part = vocab_size // 3
    first, answers, distances = {}, {}, []
    for column, token in enumerate(inputs):
        if column < 2 * pairs:
            if column % 2 == 0:
                assert 0 <= token < part
                assert token not in first
                first[token] = column
            else:
                assert part <= token < 2 * part
                answers[inputs[column - 1]] = token
            assert targets[column] == IGNORE_INDEX
        elif token in answers:
            assert targets[column] == answers.pop(token)
            distances.append(column - first[token])
        else:
            assert 2 * part <= token < vocab_size
            assert targets[column] == IGNORE_INDEX
    assert not answers
    return distances


@settings(max_examples=80, deadline=None)
@given(made=modules())
def test_every_key_is_asked_once_and_the_target_is_its_value(made: RecallDataModule) -> None:
    sets = made.evaluation_sets()
    assert list(sets) == made.evaluation_names == ["", "_2x", "_4x", "_8x"]
    for multiple, rows in ((1, made.rows["train"]), *zip((1, 2, 4, 8), sets.values(), strict=True)):
        indices = np.arange(0, len(rows), 2)
        batch = rows.batch(indices)
        shape = (len(indices), made.sequence_length * multiple)
        assert tuple(batch) == KEYS
        for key, value in batch.items():
            assert (key, value.shape, value.dtype) == (key, shape, torch.int64)
        assert not batch["document_ids"].any()
        assert batch["positions"].tolist() == [list(range(shape[1]))] * shape[0]
        pairs_of_rows = zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)
        for inputs, targets in pairs_of_rows:
            distances = read(inputs, targets, made.pairs, made.vocab_size)
            if made.max_distance is not None:
                assert max(distances) <= made.max_distance * multiple
        answers = batch["targets"] != IGNORE_INDEX
        assert rows.num_targets(indices) == int(answers.sum()) == made.pairs * len(indices)


@settings(max_examples=40, deadline=None)
@given(made=modules(), data=st.data())
def test_a_row_depends_on_its_number_alone(made: RecallDataModule, data: st.DataObject) -> None:
    rows = made.rows["train"]
    whole = rows.batch(np.arange(len(rows)))
    some = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    # A worker process gets a copy by pickle.
    for same in (rows, pickle.loads(pickle.dumps(rows))):
        batch = same.batch(np.array(some, np.int64))
        assert all(torch.equal(batch[key], whole[key][some]) for key in KEYS)
    # In new memory: the loader writes into it.
    batch["input_ids"].fill_(0)
    batch["positions"].fill_(0)
    again = rows.batch(np.arange(len(rows)))
    assert all(torch.equal(again[key], whole[key]) for key in KEYS)


def test_the_stream_of_random_numbers_is_kept() -> None:
    batch = RecallRows(12, 2, 12, size=100, seed=5, stream=3).batch([0, 99])
    # Numpy's promise, and that a change here that makes other rows is meant.
    assert batch["input_ids"].tolist() == [
        [2, 4, 3, 4, 9, 9, 2, 10, 11, 11, 8, 3],
        [0, 6, 1, 4, 0, 10, 11, 1, 9, 9, 11, 10],
    ]


@pytest.mark.parametrize("changes", [{}, {"lengths": (1, 3)}, {"max_distance": 9}])
def test_no_two_sets_share_a_row(changes: dict[str, Any]) -> None:
    made = module(train_rows=500, validation_rows_per_length=500, sequence_length=30, **changes)
    other = module(train_rows=500, validation_rows_per_length=500, sequence_length=30, seed=1)
    sets = [made.rows["train"], *made.evaluation_sets().values(), other.rows["train"]]
    # The first 30 tokens of longer rows, too, are no other set's.
    starts = [tuple(row[:30]) for rows in sets for row in tokens(rows)]
    assert len(set(starts)) == len(starts) == 500 * len(sets)


def tokens(rows: Any) -> list[list[int]]:
    return rows.batch(np.arange(len(rows)))["input_ids"].tolist()


@pytest.mark.parametrize(
    ("max_distance", "suffix", "end"),
    [(None, "", 24), (None, "_4x", 96), (11, "", 12), (11, "_4x", 45), (99, "", 24)],
)
def test_questions_are_spread_evenly(max_distance: int | None, suffix: str, end: int) -> None:
    made = module(sequence_length=24, max_distance=max_distance, validation_rows_per_length=2000)
    rows = made.evaluation_sets()[suffix]
    asked = rows.batch(np.arange(2000))["targets"] != IGNORE_INDEX
    expected = 3 / (end - 6)
    deviation = (expected * (1 - expected) / 2000) ** 0.5
    assert ((asked[:, 6:end].float().mean(0) - expected).abs() < 5 * deviation).all()
    assert not asked[:, end:].any()
    # Neither does the order of the questions follow that of the pairs.
    inputs, chosen = rows.batch(np.arange(2000))["input_ids"], asked.float().argmax(1)
    first_asked = inputs.gather(1, chosen[:, None])[:, 0]
    for pair in range(3):
        assert abs((first_asked == inputs[:, 2 * pair]).float().mean() - 1 / 3) < 0.05


def test_keys_values_and_filler_are_drawn_evenly_and_independently() -> None:
    inputs = RecallRows(60, 3, 20, 3000).batch(np.arange(3000))["input_ids"].numpy()
    # 6 keys, 6 values, 8 ids of filler.
    for columns, expected in (
        (inputs[:, 0:6:2], np.repeat([1 / 6, 0], [6, 14])),
        (inputs[:, 1:6:2], np.repeat([0, 1 / 6, 0], [6, 6, 8])),
        (inputs[:, 6:][inputs[:, 6:] >= 12], np.repeat([0, 1 / 8], [12, 8])),
    ):
        share = np.bincount(columns.ravel(), minlength=20) / columns.size
        assert np.allclose(share, expected, atol=5 * (1 / 6 / columns.size) ** 0.5)
    pairs = inputs[:, 0] * 6 + inputs[:, 1] - 6
    assert np.allclose(np.bincount(pairs, minlength=36) / 3000, 1 / 36, atol=0.015)
    # Values may repeat: an answer must not tell what the others are.
    assert abs((inputs[:, 1] == inputs[:, 3]).mean() - 1 / 6) < 0.035


def test_batches_of_training_at_every_number_of_processes() -> None:
    rows = module().rows["train"]
    found = []
    for world in (1, 2, 4):
        loaders = [iter(TrainLoader(rows, 8, 8 // world, rank, world)) for rank in range(world)]
        batches = [next(loader) for loader in loaders]
        assert {batch["num_targets"] for batch in batches} == {24}
        found.append(torch.cat([batch["input_ids"] for batch in batches]))
    assert all(torch.equal(batch, found[0]) for batch in found)


def test_validation_batches_hold_as_many_tokens_at_every_length() -> None:
    made = module(lengths=(8, 2, 1, 16), validation_rows_per_length=12)
    loaders = made.val_dataloader()
    assert made.evaluation_names == ["", "_2x", "_8x", "_16x"]
    shapes = [tuple(next(iter(loader))["input_ids"].shape) for loader in loaders]
    assert shapes == [(8, 16), (4, 32), (1, 128), (1, 256)]
    assert [len(loader) for loader in loaders] == [2, 3, 12, 12]
    for loader in loaders:
        assert sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in loader) == 12 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 7}, "data.pairs is 7; with data.vocab_size 20 there are 6 keys: .* 1 to 6"),
        ({"pairs": 0}, "data.pairs is 0; .* allowed are 1 to 6"),
        ({"vocab_size": 5}, "data.vocab_size is 5; .* at least 6"),
        ({"vocab_size": 0}, "data.vocab_size is 0; .* at least 6"),
        ({"sequence_length": 8}, "data.sequence_length is 8; with data.pairs 3 .* at least 9"),
        ({"sequence_length": 0}, "data.sequence_length is 0; it must be at least 2"),
        ({"max_distance": 7}, "data.max_distance is 7; with data.pairs 3 .* at least 8, or null"),
        ({"max_distance": 0}, "data.max_distance is 0; with data.pairs 3 .* at least 8, or null"),
        ({"train_rows": 0}, "data.train_rows is 0; it must be at least 1"),
        (
            {"validation_rows_per_length": -1},
            "data.validation_rows_per_length is -1; it must be at least 1",
        ),
        ({"lengths": ()}, r"data.lengths is \[\]; it must be 1 and other multiples"),
        ({"lengths": (2, 4)}, r"data.lengths is \[2, 4\]; it must be 1 and other multiples"),
        ({"lengths": (1, 2, 2)}, r"data.lengths is \[1, 2, 2\]; .* each once"),
        ({"lengths": (0, 1)}, r"data.lengths is \[0, 1\]; .* from 2 on"),
        ({"global_batch_size": 0}, "data.global_batch_size is 0; it must be at least 1"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "data.seed is -1; it must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        RecallDataModule(**{**SIZES, **changes})
    assert "\n" not in str(caught.value)


def test_a_row_that_does_not_exist() -> None:
    rows = RecallRows(12, 2, 12, size=3)
    assert len(rows) == 3
    for bad in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            rows.batch([0, bad])
