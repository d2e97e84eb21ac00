from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepp.data.packing.concat import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    Concat,
    ConcatRows,
    length_percentiles,
)
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

MakeCorpus = Callable[[Sequence[int]], Corpus]
lengths_of_documents = st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(
    lambda lengths: sum(lengths) >= 2
)


def all_rows(rows: ConcatRows) -> dict[str, torch.Tensor]:
    return rows.batch(np.arange(len(rows)))


def expected_rows(corpus: Corpus, length: int, mask: bool) -> dict[str, list[list[int]]]:
    """Token by token, from the documents."""
    ends = corpus.offsets.tolist()
    document_of = [d for d in range(len(ends) - 1) for _ in range(ends[d], ends[d + 1])]
    tokens = corpus.tokens.tolist()
    expected: dict[str, list[list[int]]] = {
        key: [] for key in ("input_ids", "targets", "document_ids", "positions")
    }
    begin = 0
    while begin + 1 < len(tokens):
        row: list[tuple[int, int, int, int]] = []
        for at in range(begin, begin + length):
            if at >= len(tokens):
                row.append((0, -100, -1, 0))
                continue
            last_of_document = at + 1 == len(tokens) or document_of[at + 1] != document_of[at]
            target = -100 if last_of_document else tokens[at + 1]
            first = max(begin, ends[document_of[at]]) if mask else begin
            number = document_of[at] - document_of[begin] if mask else 0
            row.append((tokens[at], target, number, at - first))
        for key, column in zip(expected, zip(*row, strict=True), strict=True):
            expected[key].append(list(column))
        begin += length
    return expected


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of_documents, data=st.data(), mask=st.booleans())
def test_rows_equal_those_made_token_by_token(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject, mask: bool
) -> None:
    corpus = memory_corpus(lengths)
    length = data.draw(st.integers(1, sum(lengths)))
    rows = ConcatRows(corpus, length, mask_documents=mask)
    expected = expected_rows(corpus, length, mask)
    assert {key: value.tolist() for key, value in all_rows(rows).items()} == expected
    some = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    batch = rows.batch(some)
    for key, values in expected.items():
        assert batch[key].dtype == torch.int64
        assert batch[key].shape == (len(some), length)
        assert batch[key].tolist() == [values[row] for row in some]


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_documents, data=st.data())
def test_no_token_is_lost_or_doubled(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject
) -> None:
    corpus = memory_corpus(lengths)
    rows = ConcatRows(corpus, data.draw(st.integers(1, sum(lengths))))
    batch = all_rows(rows)
    filled = batch["document_ids"] != PADDING_DOCUMENT
    inputs = batch["input_ids"][filled].tolist()
    tokens = corpus.tokens.tolist()
    assert inputs in (tokens, tokens[:-1])
    # Every token of a document but its first is a target exactly once.
    firsts = set(corpus.tokens[corpus.offsets[:-1]].tolist())
    targets = batch["targets"][batch["targets"] != IGNORE_INDEX].tolist()
    assert targets == [token for token in tokens if token not in firsts]
    starts = batch["input_ids"][filled & (batch["positions"] == 0)].tolist()
    row_firsts = {row[0] for row in batch["input_ids"].tolist()}
    assert starts == [token for token in inputs if token in firsts | row_firsts]


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_of_documents, data=st.data())
def test_targets_are_counted_without_reading_tokens(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject
) -> None:
    rows = ConcatRows(memory_corpus(lengths), data.draw(st.integers(1, sum(lengths))))
    some = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    assert rows.num_targets(some) == int((rows.batch(some)["targets"] != IGNORE_INDEX).sum())


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_of_documents, data=st.data())
def test_the_summary_counts_what_the_rows_hold(
    memory_corpus: MakeCorpus, lengths: list[int], data: st.DataObject
) -> None:
    corpus = memory_corpus(lengths)
    rows = Concat().rows(corpus, data.draw(st.integers(1, sum(lengths))), True)
    batch, summary = rows.batch(np.arange(len(rows))), rows.summary()
    filled = batch["document_ids"] != PADDING_DOCUMENT
    targets = batch["targets"] != IGNORE_INDEX
    held = {*batch["input_ids"][filled].tolist(), *batch["targets"][targets].tolist()}
    assert summary["tokens_lost"] == (sum(lengths) - len(held)) / sum(lengths)
    assert summary["places_padded"] == int((~filled).sum()) / filled.numel()
    # Rows in which a document has an input with a target.
    found: dict[int, set[int]] = {}
    for row, column in targets.nonzero().tolist():
        token = int(batch["input_ids"][row, column]) - 1
        document = int(np.searchsorted(corpus.offsets, token, "right")) - 1
        found.setdefault(document, set()).add(row)
    split = [document for document, places in found.items() if len(places) > 1]
    assert summary["documents_split"] == len(split) / len(lengths)
    assert summary["tokens_split"] == sum(lengths[document] for document in split) / sum(lengths)
    assert (summary["rows"], summary["length"]) == (len(rows), rows.length)
    assert (summary["documents"], summary["tokens"]) == (len(lengths), sum(lengths))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_percentiles_of_lengths(lengths: list[int]) -> None:
    found = length_percentiles(np.array(lengths))
    tokens = [length for length in lengths for _ in range(length)]
    for key, values in (("by_document", lengths), ("by_token", tokens)):
        for percent, length in found[key].items():
            # The smallest length that so many reach at most.
            share = [100 * sum(v <= top for v in values) for top in (length - 1, length)]
            assert share[1] >= int(percent) * len(values)
            assert share[0] < max(int(percent), 1) * len(values) or percent == "0"
        assert (found[key]["0"], found[key]["100"]) == (min(lengths), max(lengths))


@pytest.mark.parametrize(("lengths", "length"), [([3, 4], 8), ([3, 4], 0), ([1], 1)])
def test_a_length_that_does_not_fit(
    memory_corpus: MakeCorpus, lengths: list[int], length: int
) -> None:
    message = f"length is {length}; the train split of memory has {sum(lengths)} tokens"
    with pytest.raises(InputError, match=message):
        ConcatRows(memory_corpus(lengths), length)


def test_a_row_that_does_not_exist(memory_corpus: MakeCorpus) -> None:
    rows = ConcatRows(memory_corpus([5, 5]), 3)
    assert len(rows) == 3
    for bad in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            rows.batch([0, bad])
