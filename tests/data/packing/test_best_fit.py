import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.corpora import random_documents, snapshot, write_corpus
from ropepp.data.loading.loader import EvalLoader
from ropepp.data.packing import packing_index
from ropepp.data.packing.best_fit import BestFit, BestFitRows, Long
from ropepp.data.packing.concat import IGNORE_INDEX, PADDING_DOCUMENT, PackedRows, Packing
from ropepp.data.packing.packing_index import NOWHERE, best_fit_decreasing
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

MakeCorpus = Callable[[Sequence[int]], Corpus]
lengths_of_documents = st.lists(st.integers(1, 20), min_size=1, max_size=25).filter(
    lambda lengths: max(lengths) >= 2
)
packings = st.sampled_from([BestFit(), Long(0.3), Long(0.5), Long(1.0)])


def try_rows(packing: Packing, corpus: Corpus, length: int, mask: bool) -> PackedRows | None:
    with suppress(InputError):
        return packing.rows(corpus, length, mask)
    # The corpus is not empty and as long as a row.
    assert isinstance(packing, Long)
    return None


def naive_best_fit(sizes: Sequence[int], capacity: int, least: int) -> tuple[list[int], list[int]]:
    """Item by item; the rooms that are left in the bins, and the sizes that are in none."""
    rooms: list[int] = []
    out = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if size == 0:
            continue
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        elif size >= least:
            rooms.append(capacity - size)
        else:
            out.append(size)
    return sorted(rooms), sorted(out)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_bins_are_those_of_best_fit_decreasing(data: st.DataObject, capacity: int) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(0, capacity), max_size=60)), np.uint16)
    least = data.draw(st.integers(1, capacity))
    bins = best_fit_decreasing(sizes, capacity, least)
    held = bins != NOWHERE
    used = np.bincount(bins[held].astype(int), sizes[held])
    rooms, out = naive_best_fit(sizes.tolist(), capacity, least)
    assert sorted((capacity - used).astype(int).tolist()) == rooms
    assert sorted(sizes[~held & (sizes > 0)].tolist()) == out
    assert not held[sizes == 0].any()


def test_many_items_take_few_steps() -> None:
    """Half a million documents, lengths as of web text: almost no room is left."""
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(6.2, 1.1, 500_000), 2, 4096).astype(np.uint16)
    bins = best_fit_decreasing(sizes, 4097)
    used = np.bincount(bins, sizes)
    assert used.max() <= 4097
    assert used.sum() == sizes.sum()
    assert 1 - used.mean() / 4097 < 1e-3


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_of_documents, data=st.data(), mask=st.booleans(), packing=packings)
def test_every_token_is_once_in_a_row_or_counted_as_lost(
    memory_corpus: MakeCorpus,
    lengths: list[int],
    data: st.DataObject,
    mask: bool,
    packing: Packing,
) -> None:
    corpus = memory_corpus(lengths)
    rows = try_rows(packing, corpus, data.draw(st.integers(1, sum(lengths))), mask)
    if rows is None:
        return
    batch = rows.batch(np.arange(len(rows)))
    filled = batch["document_ids"] != PADDING_DOCUMENT
    counted = batch["targets"] != IGNORE_INDEX
    inputs = Counter(batch["input_ids"][filled].tolist())
    targets = Counter(batch["targets"][counted].tolist())
    assert max(inputs.values()) == max(targets.values()) == 1  # ids differ between tokens
    # A target is the next token: of the same document, which no first token's id is.
    assert (batch["targets"] == batch["input_ids"] + 1)[counted].all()
    firsts, lasts = corpus.offsets[:-1] + 1, corpus.offsets[1:]
    assert not targets.keys() & set(firsts.tolist())
    lost = set(corpus.tokens.tolist()) - inputs.keys() - targets.keys()
    summary = rows.summary()
    assert summary["tokens_lost"] == len(lost) / sum(lengths)
    assert summary["places_padded"] == int((~filled).sum()) / filled.numel()
    if packing == BestFit():
        assert lost == set(firsts[firsts == lasts].tolist())  # a token alone has no target
        # What is no input ends its document, and is a target.
        assert corpus.tokens.tolist() == sorted(
            inputs.keys() | (set(lasts.tolist()) & targets.keys()) | lost
        )
    # Padding is at the end.
    assert (filled.long().diff(dim=1) <= 0).all()
    assert not (counted & ~filled).any()


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents, data=st.data(), packing=packings)
def test_documents_and_positions_begin_with_pieces(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject, packing: Packing
) -> None:
    corpus = memory_corpus(lengths)
    length = data.draw(st.integers(1, sum(lengths)))
    rows = try_rows(packing, corpus, length, True)
    if rows is None:
        return
    batch = {key: value.tolist() for key, value in rows.batch(np.arange(len(rows))).items()}
    crossing = packing.rows(corpus, length, False).batch(np.arange(len(rows)))
    starts = set((corpus.offsets[:-1] + 1).tolist())
    split = set()
    for row in range(len(rows)):
        ids, numbers = batch["input_ids"][row], batch["document_ids"][row]
        size = sum(number >= 0 for number in numbers)
        document, position = -1, 0
        for column in range(size):
            new = column == 0 or ids[column] != ids[column - 1] + 1 or ids[column] in starts
            document, position = (document + 1, 0) if new else (document, position + 1)
            assert (numbers[column], batch["positions"][row][column]) == (document, position)
            if new and ids[column] not in starts:
                split.add(int(np.searchsorted(corpus.offsets, ids[column] - 1, "right")) - 1)
        padding = length - size
        assert batch["positions"][row][size:] == ids[size:] == [0] * padding
        assert crossing["document_ids"][row].tolist() == [0] * size + [-1] * padding
        assert crossing["positions"][row].tolist() == [*range(size)] + [0] * padding
    assert crossing["input_ids"].tolist() == batch["input_ids"]
    assert crossing["targets"].tolist() == batch["targets"]
    # Only documents that no row can hold are split, into rows that they begin.
    assert all(lengths[document] > length + 1 for document in split)
    assert rows.summary()["documents_split"] == len(split) / len(lengths)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents, data=st.data(), share=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_long_rows_hold_a_long_piece(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject, share: float
) -> None:
    corpus = memory_corpus(lengths)
    length = data.draw(st.integers(1, sum(lengths)))
    rows = try_rows(Long(share), corpus, length, True)
    long_enough = [size for size in lengths if size - 1 >= length or size >= share * length]
    if rows is None:
        assert not [size for size in long_enough if size >= 2]
        return
    batch = rows.batch(np.arange(len(rows)))
    # The longest piece, with the token after the row's end.
    longest = batch["positions"].max(1).values + 1
    assert (longest + 1 >= share * length).all()
    used = rows.summary()["document_lengths"]["by_document"]
    assert used["100"] == max(lengths)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of_documents, data=st.data(), packing=packings)
def test_a_row_depends_on_its_number_alone(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject, packing: Packing
) -> None:
    rows = try_rows(packing, memory_corpus(lengths), data.draw(st.integers(1, sum(lengths))), True)
    if rows is None:
        return
    whole = rows.batch(np.arange(len(rows)))
    some = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    batch = rows.batch(some)
    for key, values in batch.items():
        assert values.dtype == torch.int64
        assert values.tolist() == whole[key][some].tolist()
    assert rows.num_targets(some) == int((batch["targets"] != IGNORE_INDEX).sum())
    with pytest.raises(IndexError, match=f"of {len(rows)}"):
        rows.batch([len(rows)])


def test_rows_by_hand(memory_corpus: MakeCorpus) -> None:
    # 4 + 1 fill a row of 4 inputs; 9 tokens are two rows and no remainder; 7 leave 3.
    rows = BestFitRows(memory_corpus([9, 4, 7, 1, 2]), 4)
    batch = rows.batch(range(len(rows)))
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [14, 15, 16, 17],
        [10, 11, 12, 13],
        [18, 19, 20, 22],
    ]
    assert batch["targets"].tolist() == [
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [15, 16, 17, 18],
        [11, 12, 13, -100],
        [19, 20, -100, 23],
    ]
    assert batch["positions"].tolist()[-1] == [0, 1, 2, 0]
    assert rows.num_targets([0, 3, 4]) == 10
    summary = rows.summary()
    assert summary["document_lengths"]["by_document"]["50"] == 4
    assert summary["document_lengths"]["by_token"]["50"] == 7
    del summary["document_lengths"]
    assert summary == {
        "rows": 5,
        "length": 4,
        "documents": 5,
        "tokens": 23,
        "tokens_lost": 1 / 23,
        "places_padded": 0,
        "documents_split": 2 / 5,
        "tokens_split": 16 / 23,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(tmp_path, random_documents(np.random.default_rng(0), 200, 90))
    return Corpus.open(tmp_path, "train")


def same(first: PackedRows, second: PackedRows) -> bool:
    numbers = np.arange(len(first))
    left, right = first.batch(numbers), second.batch(np.arange(len(second)))
    return all(torch.equal(left[key], right[key]) for key in left)


def test_the_packing_is_kept_beside_the_corpus(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Long().rows(corpus, 64)
    file = corpus.folder / "train" / "best_fit_64_32.index"
    assert [path.name for path in file.parent.glob("*best_fit*")] == [file.name]
    monkeypatch.setattr(packing_index, "build_index", None)
    assert same(Long().rows(corpus, 64), made)
    assert same(pickle.loads(pickle.dumps(made)), made)
    batches = [batch["input_ids"] for batch in EvalLoader(made, 3)]
    assert len(batches) == -(-len(made) // 3)
    corpus.verify()


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "text", "flipped", "gone", "swapped"])
def test_an_index_of_another_packing_or_damaged_is_replaced(corpus: Corpus, damage: str) -> None:
    made = BestFit().rows(corpus, 64)
    folder = corpus.folder / "train" / "best_fit_64_1.index"
    content = snapshot(folder)
    key, packed = content["key.json"], content["packed.bin"]
    name, damaged = {
        "cut": ("packed.bin", packed[:-4]),
        "other": ("key.json", key.replace(b'"documents": 200', b'"documents": 201')),
        "empty": ("packed.bin", b""),
        "text": ("key.json", b"[1]\nno index"),
        "flipped": ("packed.bin", packed[:9] + bytes([packed[9] ^ 1]) + packed[10:]),
        "gone": ("packed.bin", None),
        "swapped": ("packed.bin", packed[4:8] + packed[:4] + packed[8:]),
    }[damage]
    (folder / name).unlink()
    if damaged is not None:
        (folder / name).write_bytes(damaged)
    with pytest.warns(UserWarning, match=rf"{name} .*; the index is made anew"):
        assert same(BestFit().rows(corpus, 64), made)
    assert snapshot(folder) == content


def test_a_folder_that_cannot_be_written(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(packing_index, "replacing_folder", refuse)
    rows = BestFit().rows(corpus, 64)
    assert rows.summary()["tokens_lost"] == 0
    assert [path.name for path in (corpus.folder / "train").glob("*best_fit*")] == []


def test_bad_input(memory_corpus: MakeCorpus) -> None:
    with pytest.raises(InputError, match="length is 8; the train split of memory has 7 tokens"):
        BestFit().rows(memory_corpus([3, 4]), 8)
    with pytest.raises(InputError, match="memory has no document of at least 2 tokens in its"):
        BestFit().rows(memory_corpus([1, 1, 1]), 2)
    with pytest.raises(InputError, match=r"no document of at least 6 tokens .* for rows of 6"):
        Long(1.0).rows(memory_corpus([3, 4, 5]), 6)
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"packing.share is .*; allowed are above 0 to 1"):
            Long(bad)
    with pytest.raises(TypeError, match="Packing is no packing"):
        Packing().rows(memory_corpus([3, 4]), 2)
