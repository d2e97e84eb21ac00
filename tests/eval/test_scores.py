"""Means and their errors, SQuAD's rules, batches by length."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepp.eval import harness
from ropepp.eval.evaluated_model import by_length
from ropepp.eval.generated import averages
from ropepp.eval.scores import Score, average, mean_of, ratio_of


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_each_once_and_no_more_than_they_may(lengths: list[int], most: int) -> None:
    batches = by_length(lengths, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most


def test_errors_of_means() -> None:
    values = [1.0, 2.0, 4.0]
    assert mean_of(values) == pytest.approx((7 / 3, (7 / 3 / 3) ** 0.5))
    assert ratio_of(values, [1, 1, 1]) == pytest.approx(mean_of(values))
    assert mean_of([2.0]) == (2.0, None)
    # Against the spread of many drawn samples.
    rng, found = Random(0), []
    for _ in range(2000):
        counts = [rng.choice([1, 2, 5]) for _ in range(50)]
        found.append(ratio_of([c * 2 + rng.gauss(0, c) for c in counts], counts))
    spread = torch.tensor([ratio for ratio, _ in found]).std().item()
    assert torch.tensor([e for _, e in found]).mean().item() == pytest.approx(spread, rel=0.05)
    rows = [
        Score("m", "ruler", name, 64, "score", value, 0.3, 5, base)
        for name, value, base in (("a", 0.2, 0.5), ("b", 0.6, None))
    ]
    assert average(rows, "both") == Score(
        "m", "ruler", "both", 64, "score", 0.4, pytest.approx(0.3 / 2**0.5), 10, None
    )
    assert [r.task for r in averages(rows)] == ["average of 2"]
    assert averages(rows[:1]) == []


def test_the_rules_of_squad() -> None:
    assert harness.squad_score("exact_match", "The Cat.", "cat") == 1
    assert harness.squad_score("exact_match", "cat dog", "dog cat") == 0
    assert harness.squad_score("f1", "the cat sat", "A cat ran, fast") == pytest.approx(2 / 5)
    assert harness.squad_score("f1", "the", "") == 1
    assert harness.squad_score("f1", "cat", "the") == 0
