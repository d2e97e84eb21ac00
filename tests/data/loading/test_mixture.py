import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.corpora import random_documents, write_corpus
from helpers.fit_runs import CONFIG, curve, fit
from helpers.raw_text import json_lines
from helpers.rows import NumberRows, assert_same, take
from ropepp.data.loading.datamodule import CorpusDataModule
from ropepp.data.loading.loader import TrainLoader, permutation
from ropepp.data.loading.mixture import MAX_PERIOD, MixtureOrder, MixtureRows, MixtureSchedule
from ropepp.data.packing.best_fit import BestFit
from ropepp.data.packing.concat import KEYS, Concat, ConcatRows, Packing
from ropepp.data.prepare.prepare import prepare
from ropepp.data.tokenizer import BytesTokenizer
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

MakeCorpus = Callable[[Sequence[int]], Corpus]
whole_weights = st.lists(st.integers(1, 30), min_size=1, max_size=7)
sizes_of_corpora = st.lists(st.integers(1, 9), min_size=1, max_size=5)


class Part(NumberRows):
    """Rows that hold their own number and that of their corpus."""

    length = 2

    def __init__(self, size: int, corpus: int) -> None:
        super().__init__(size)
        self.corpus = corpus

    def batch(self, indices: Any) -> dict[str, torch.Tensor]:
        batch = super().batch(indices)
        batch["input_ids"][:, 1] = self.corpus
        return batch


def mixture(sizes: Sequence[int], weights: Sequence[float]) -> MixtureRows:
    parts = {f"corpus{i}": Part(size, i) for i, size in enumerate(sizes)}
    return MixtureRows(parts, MixtureSchedule.of(weights))


def loader(rows: MixtureRows, *sizes: int) -> TrainLoader:
    return TrainLoader(rows, *sizes, order=MixtureOrder(rows, 3))


def samples(batches: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """(row, corpus) of every sample."""
    return [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]


@settings(max_examples=300, deadline=None)
@given(weights=whole_weights)
def test_every_prefix_has_its_proportions_to_within_one(weights: list[int]) -> None:
    schedule = MixtureSchedule.of(weights)
    total, count = sum(weights), 2 * sum(weights) + 3
    corpora, numbers = schedule.place(0, count)
    had = np.cumsum(corpora[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.outer(np.arange(1, count + 1), weights)
    # In whole numbers: |had - n w| <= 1 - 1 / (2k - 2), which is below 1.
    behind = np.abs(had * total - ideal).max()
    assert behind < total
    k = len(weights)
    assert behind * (2 * k - 2) <= total * (2 * k - 3) or k == 1
    assert numbers.tolist() == [had[n, corpus] - 1 for n, corpus in enumerate(corpora)]


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=6))
def test_any_numbers_are_weights(weights: list[float]) -> None:
    schedule = MixtureSchedule.of(weights)
    period, total = len(schedule.corpora), sum(map(Fraction, weights))
    assert period <= MAX_PERIOD
    assert np.bincount(schedule.corpora).tolist() == list(schedule.counts)
    for count, weight in zip(schedule.counts, weights, strict=True):
        assert abs(Fraction(count, period) - Fraction(weight) / total) < Fraction(1, MAX_PERIOD)
    corpora = schedule.corpora
    had = np.cumsum(corpora[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.outer(np.arange(1, period + 1), schedule.counts)
    assert np.abs(had * period - ideal).max() < period


def test_weights_are_taken_as_they_are_written() -> None:
    assert MixtureSchedule.of([0.7, 0.2, 0.1]).counts == (7, 2, 1)
    assert MixtureSchedule.of([0.3333, 0.3333, 0.3333]).counts == (1, 1, 1)
    assert MixtureSchedule.of([6, 2.0, 4]).counts == (3, 1, 2)
    assert MixtureSchedule.of([5]).counts == (1,)
    # Fixed for good: another order would change the data of a resumed run.
    assert MixtureSchedule.of([0.5, 0.3, 0.2]).corpora.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize(
    "weights", [[], [0.5, 0.0], [1, -1], [float("nan")], [1, float("inf")], [1, 1e-9]]
)
def test_what_is_no_weight(weights: list[float]) -> None:
    with pytest.raises(
        InputError, match=r"data.corpus has weights \[.*; (allowed: numbers above|each must be)"
    ):
        MixtureSchedule.of(weights)


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of_corpora, data=st.data(), begin=st.integers(0, 300), count=st.integers(1, 40))
def test_a_sample_is_a_function_of_its_number(
    sizes: list[int], data: st.DataObject, begin: int, count: int
) -> None:
    weights = [data.draw(st.integers(1, 6)) for _ in sizes]
    rows = mixture(sizes, weights)
    order, schedule = MixtureOrder(rows, seed=3), rows.schedule
    whole = MixtureOrder(rows, seed=3).rows(0, begin + count)
    assert order.rows(begin, begin + count).tolist() == whole[begin:].tolist()
    corpora, _ = schedule.place(0, begin + count)
    for corpus, size in enumerate(sizes):
        own = whole[corpora == corpus] - sum(sizes[:corpus])
        # Each corpus has epochs of its own, in an order of its own.
        epochs = range(-(-len(own) // size))
        expected = [row for e in epochs for row in permutation(3, e, size, corpus).tolist()]
        assert own.tolist() == expected[: len(own)]


def test_corpora_of_one_size_have_orders_of_their_own() -> None:
    orders = [permutation(0, 0, 50, stream).tolist() for stream in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(0, 0, 50).tolist() == orders[0]


@settings(max_examples=40, deadline=None)
@given(
    sizes=sizes_of_corpora,
    data=st.data(),
    steps=st.integers(0, 6),
    then=st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 2), (4, 1), (1, 8)]),
)
def test_resume_with_another_number_of_processes_and_micro_batch(
    sizes: list[int], data: st.DataObject, steps: int, then: tuple[int, int]
) -> None:
    rows = mixture(sizes, [data.draw(st.integers(1, 6)) for _ in sizes])
    before = loader(rows, 8, 2, 1, 2)
    take(before, steps * before.accumulation)
    state = before.state_dict()
    assert state == {"samples": steps * 8}
    expected = samples(take(loader(rows, 8, 8), steps + 3))[steps * 8 :]
    world, micro = then
    ranks = [loader(rows, 8, micro, rank, world) for rank in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    batches = [take(rank, 3 * rank.accumulation) for rank in ranks]
    assert samples(list(itertools.chain(*zip(*batches, strict=True)))) == expected
    for step in range(3):
        part = slice(step * ranks[0].accumulation, (step + 1) * ranks[0].accumulation)
        of_step = [batch for rank in batches for batch in rank[part]]
        targets = sum(int((batch["targets"] != -100).sum()) for batch in of_step)
        assert {batch["num_targets"] for batch in of_step} == {targets}


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_of_corpora, done=st.integers(0, 25), data=st.data())
def test_resume_gives_exactly_the_rest(sizes: list[int], done: int, data: st.DataObject) -> None:
    rows = mixture(sizes, [data.draw(st.integers(1, 6)) for _ in sizes])
    whole = take(loader(rows, 8, 2), done + 12)
    first, second = loader(rows, 8, 2), loader(rows, 8, 2)
    take(first, done)
    second.load_state_dict(first.state_dict())
    assert_same(take(second, 12), whole[done:])


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_of_corpora, data=st.data())
def test_rows_in_proportion(sizes: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.integers(1, 6)) for _ in sizes]
    rows = mixture(sizes, weights)
    chosen = rows.in_proportion()
    found = [tuple(row) for row in chosen.batch(np.arange(len(chosen)))["input_ids"].tolist()]
    assert len(set(found)) == len(found)
    for corpus in range(len(sizes)):
        own = [number for number, of in found if of == corpus]
        assert own == list(range(len(own)))  # the first ones
        assert abs(len(own) * sum(weights) - len(found) * weights[corpus]) < sum(weights)
    # One more would need a row that is not there.
    corpora, numbers = MixtureSchedule.of(weights).place(len(found), len(found) + 1)
    assert numbers[0] == sizes[corpora[0]]
    assert chosen.num_targets(range(len(chosen))) == sum(number % 3 for number, _ in found)


def test_rows_of_corpora_have_one_numbering(memory_corpus: MakeCorpus) -> None:
    parts = [ConcatRows(memory_corpus(lengths), 4) for lengths in ([7, 9], [5], [30, 2])]
    rows = MixtureRows(dict(zip("abc", parts, strict=True)), MixtureSchedule.of([2, 1, 1]))
    assert len(rows) == 4 + 1 + 8
    batch = rows.batch([12, 0, 4, 3, 12])
    own = [parts[2].batch([7]), parts[0].batch([0]), parts[1].batch([0]), parts[0].batch([3])]
    for key, values in batch.items():
        assert values.dtype == torch.int64
        assert torch.equal(values, torch.cat([part[key] for part in [*own, own[0]]]))
    assert rows.num_targets([12, 0, 4, 3, 12]) == int((batch["targets"] != -100).sum())
    for bad in (-1, 13):
        with pytest.raises(IndexError, match="of 13"):
            rows.batch([0, bad])


class Other(BytesTokenizer):
    """The same ids under another fingerprint."""

    fingerprint = "f" * 64


def write(folder: Path, documents: int, tokenizer: BytesTokenizer | None = None) -> str:
    random = np.random.default_rng(documents)
    for split, count in (("train", documents), ("validation", documents // 4)):
        write_corpus(folder, random_documents(random, count, 60), tokenizer, split)
    return str(folder)


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, float]:
    return {
        write(tmp_path / "web", 200): 0.6,
        write(tmp_path / "code.v1", 50): 0.3,
        write(tmp_path / "books", 80): 0.1,
    }


SIZES: dict[str, Any] = {"sequence_length": 32, "global_batch_size": 6, "micro_batch_size": 3}


def module(corpora: dict[str, float], **changes: Any) -> CorpusDataModule:
    made = CorpusDataModule(corpora, **{**SIZES, **changes})
    made.setup("fit")
    return made


def test_a_mixture_reads_every_corpus_as_it_would_alone(corpora: dict[str, float]) -> None:
    made = module(corpora)
    mixed = take(made.train_dataloader(), 40)
    rows = torch.cat([batch["input_ids"] for batch in mixed])
    corpus, _ = made.schedule.place(0, len(rows))
    assert np.bincount(corpus).tolist() == [72, 36, 12]
    folder = next(iter(corpora))
    alone = CorpusDataModule(folder, **SIZES)
    alone.setup("fit")
    first = torch.cat([batch["input_ids"] for batch in take(alone.train_dataloader(), 24)])
    assert torch.equal(rows[torch.from_numpy(corpus == 0)], first)
    single = module({folder: 3.0})
    assert_same(take(single.train_dataloader(), 24), take(alone.train_dataloader(), 24))
    left, right = (next(iter(one.val_dataloader()[0])) for one in (single, alone))
    assert_same([left], [right])
    assert single.evaluation_names == alone.evaluation_names == [""]


# Written down when one corpus and several had code of their own: (packing, numbers of the first
# samples' rows, sha256 of what the first 12 batches hold).
RECORDED = [
    (
        Concat(),
        [15, 13, 8, 12, 4, 14, 34, 41, 36, 44, 3, 40, 6, 2, 22, 1, 17, 43, 0, 5, 27, 30, 11, 46],
        "932203704d837179983209be2e42b57f1192cac8ca51a33d40750b2f1f6924c5",
    ),
    (
        BestFit(),
        [15, 13, 8, 12, 4, 14, 34, 41, 36, 44, 3, 40, 6, 2, 47, 22, 1, 17, 43, 0, 5, 27, 30, 11],
        "e880441ae5dd57ba61be3ff1d9e93f7b889d7c6bd79507a44571b9a3f6468424",
    ),
]


@pytest.mark.parametrize(("packing", "order", "content"), RECORDED)
def test_one_corpus_is_read_as_ever(
    packing: Packing, order: list[int], content: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(5)
    lengths = random.integers(1, 60, 60)
    texts = ["".join(chr(97 + letter) for letter in random.integers(0, 26, n)) for n in lengths]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    folder = prepare(
        str(tmp_path / "a.jsonl"), str(tmp_path / "a"), "bytes", validation_fraction=0.2
    )
    for corpus in (str(folder), {str(folder): 2.0}):
        made = CorpusDataModule(corpus, **SIZES, packing=packing, seed=7)
        made.setup("fit")
        assert made.order().rows(0, 24).tolist() == order
        digest = hashlib.sha256()
        for batch in take(made.train_dataloader(), 12):
            for key in KEYS:
                digest.update(batch[key].numpy().tobytes())
        assert digest.hexdigest() == content
        assert made.recipe == f"{packing}, rows of 32"
    # The same as the first of several, whose stream has the number 0.
    alone = MixtureRows({"a": made.rows["train"]}, MixtureSchedule.of([1]))
    assert MixtureOrder(alone, seed=7).rows(0, 24).tolist() == order


def test_validation_sets_of_a_mixture(corpora: dict[str, float]) -> None:
    made = module(corpora, extrapolation=[2], packing=BestFit())
    sets = made.evaluation_sets()
    assert list(sets) == made.evaluation_names == ["", "_2x", "_web", "_code.v1", "_books"]
    for folder in corpora:
        own = sets[f"_{Path(folder).name}"]
        expected = ConcatRows(Corpus.open(folder, "validation"), 32)
        numbers = np.arange(len(expected))
        assert_same([own.batch(numbers)], [expected.batch(numbers)])
    assert [loader.rows.length for loader in made.test_dataloader()] == [32, 64, 32, 32, 32]
    assert [loader.micro_batch_size for loader in made.test_dataloader()] == [3, 1, 3, 3, 3]
    # The packing is of training alone, and so is its file.
    files = [path for folder in corpora for path in Path(folder).rglob("*.index")]
    assert [path.parent.name for path in files] == ["train"] * 3


def test_a_mixture_needs_one_tokenizer(corpora: dict[str, float], tmp_path: Path) -> None:
    folder = write(tmp_path / "other", 9, Other())
    made = CorpusDataModule({**corpora, folder: 1.0}, **SIZES)
    first = next(iter(corpora))
    with pytest.raises(InputError, match=rf"{first} was made with .* {folder} with ffffffffffff"):
        made.setup("fit")


def test_what_a_checkpoint_says_of_the_data(corpora: dict[str, float], tmp_path: Path) -> None:
    state = module(corpora).state_dict()
    module(corpora).load_state_dict(state)
    reweighed = dict.fromkeys(corpora, 1.0)
    for other in (module(reweighed), module(corpora, packing=BestFit())):
        with pytest.warns(UserWarning, match="goes on after as many samples as it had"):
            other.load_state_dict(state)
    folder = write(tmp_path / "other", 9, Other())
    with pytest.raises(InputError, match=r"data.corpus is .*other, made with tokenizer ffffffff"):
        CorpusDataModule(folder, **SIZES).load_state_dict(state)


@pytest.mark.parametrize(
    ("corpora", "changes", "message"),
    [
        ({}, {}, r"data.corpus has weights \[\]; allowed: numbers above 0"),
        ({"a": -1.0}, {}, r"data.corpus has weights \[-1.0\]"),
        ({"x/a": 1.0, "y/a": 1.0}, {}, "the last parts of the paths name the validation sets"),
        (
            {"x/2x": 1.0, "a": 1.0},
            {"extrapolation": [2]},
            "and from the names of data.extrapolation",
        ),
        ({"a": 1.0}, {"extrapolation": [1]}, r"data.extrapolation is \[1\]"),
        ({"a": 1.0}, {"sequence_length": 0}, "data.sequence_length is 0"),
    ],
)
def test_bad_options(corpora: dict[str, float], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CorpusDataModule(corpora, **{**SIZES, **changes})


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere/train is no folder; `ropepp prepare` makes it"):
        CorpusDataModule({str(tmp_path / "nowhere"): 1.0}, **SIZES).setup("fit")


@pytest.mark.slow
def test_a_run_of_the_command_line_goes_on_exactly(
    corpora: dict[str, float], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "data": "CorpusDataModule",
        "data__corpus": corpora,
        "data__packing": "Long",
        "data__packing__share": 0.7,
        "data__extrapolation": [2],
    }
    whole = fit(tmp_path, tmp_path / "logs", "whole", **options)
    first = fit(tmp_path, tmp_path / "logs", "part", trainer__max_steps=10, **options)
    config = yaml.safe_load((first / "config.yaml").read_text())["data"]["init_args"]
    assert config["corpus"] == corpora
    assert config["packing"] == {
        "class_path": "ropepp.data.packing.best_fit.Long",
        "init_args": {"share": 0.7},
    }
    changes = {"trainer__max_steps": 20, "config": str(first / "config.yaml"), "resume": "auto"}
    nothing = dict.fromkeys([*CONFIG, "data.corpus"], None)
    part = fit(tmp_path, tmp_path / "logs", "part", **nothing, **changes)
    assert curve(part) == curve(whole)
    metrics = json.loads((part / "result.json").read_text())["evaluation"]
    assert [key for key in metrics if key.endswith("/loss")] == [
        f"validation{name}/loss" for name in ("", "_2x", "_web", "_code.v1", "_books")
    ]
