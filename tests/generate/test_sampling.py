"""Which tokens can be drawn, and how often."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepp.generate import Sampling


def brute_force(logits: list[float], sampling: Sampling) -> list[float]:
    """The rules one after another, in plain Python."""
    weights = [math.exp(x / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    total = sum(weights[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if sampling.top_p is None or reached < sampling.top_p:
            nucleus.append(i)
            reached += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.one_of(st.none(), st.integers(1, 14)),
    top_p=st.one_of(st.none(), st.sampled_from([0.05, 0.37, 0.91, 1.0])),
)
@settings(deadline=None, max_examples=150)
def test_probabilities(
    logits: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    values = [x / 10 for x in logits]
    got = sampling.probabilities(torch.tensor([values, values]))
    torch.testing.assert_close(got[0], torch.tensor(brute_force(values, sampling)))
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("top_p", [None, 0.8])
def test_draws_have_these_probabilities(top_p: float | None) -> None:
    sampling = Sampling(1.0, None, top_p)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    drawn = sampling.choose(logits, torch.Generator().manual_seed(0)).flatten()
    share = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(share, sampling.probabilities(logits[:1])[0], atol=0.015, rtol=0)


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 9)
    assert torch.equal(Sampling().choose(logits, None), logits.argmax(-1, keepdim=True))
