"""Reading prompts in chunks and writing token by token."""

import pytest
import torch

from helpers.variants import ALL, CONFIG
from ropepp.errors import InputError
from ropepp.generate import decode, generate, pad_left, stream
from ropepp.model import Transformer
from ropepp.model.cache import KVCache
from ropepp.model.positions import Position, RoPEppEC


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
def test_greedy_tokens_are_those_of_full_passes(
    position: Position, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = Transformer(CONFIG, position).eval(), torch.randint(50, (3, 9))
    want = ids
    for _ in range(5):
        want = torch.cat((want, model(want)[:, -1:].argmax(-1)), 1)
    for prefill in (4, 9, 100):
        monkeypatch.setattr(decode, "PREFILL", prefill)
        assert torch.equal(generate(model, ids, 5), want)


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prefill", [3, 100])
def test_padded_prompts_continue_as_they_would_alone(
    position: Position, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL", prefill)
    model = Transformer(CONFIG, position).eval()
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 8, 5)]
    ids, documents = pad_left(prompts)
    assert documents is not None
    ids[documents < 0] = 49  # whatever stands there
    tokens = generate(model, ids, 6, document_ids=documents)
    for row, prompt in zip(tokens, prompts, strict=True):
        alone = generate(model, torch.tensor([prompt]), 6)
        assert torch.equal(row[8 - len(prompt) :], alone[0])


def test_prompts_of_one_length_need_no_padding() -> None:
    ids, documents = pad_left([[1, 2], [3, 4]])
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert documents is None


def test_a_row_that_has_ended_waits_for_the_others() -> None:
    model = Transformer(CONFIG, RoPEppEC()).eval()
    ids = torch.randint(50, (2, 4))
    free = generate(model, ids, 12)[:, 4:].tolist()
    first = free[0][2]
    tokens = generate(model, ids, 12, stop_ids=[first])[:, 4:].tolist()
    ends = [row.index(first) + 1 if first in row else 12 for row in free]
    assert len(tokens[0]) == max(ends)
    for row, want, end in zip(tokens, free, ends, strict=True):
        assert row[:end] == want[:end]
        assert set(row[end:]) <= {first}


def test_a_cache_goes_on_where_it_was_left() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.randint(50, (1, 9))
    cache = KVCache(CONFIG.num_layers)
    with torch.inference_mode():
        model(ids[:, :6], cache=cache)
    assert torch.equal(
        generate(model, ids[:, 6:], 5, cache=cache)[:, 3:], generate(model, ids, 5)[:, 9:]
    )


def test_padding_behind_what_a_cache_holds_is_refused() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.randint(50, (1, 9))
    cache = KVCache(CONFIG.num_layers)
    generate(model, ids, 2, document_ids=torch.zeros_like(ids), cache=cache)
    with pytest.raises(InputError, match="need an empty cache"):
        generate(model, ids, 2, document_ids=torch.zeros_like(ids), cache=cache)


def test_draws_repeat_with_their_seed() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.randint(50, (4, 3))
    draws = [
        generate(model, ids, 8, 1.0, torch.Generator().manual_seed(seed), top_k=20)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_tokens_come_one_by_one_and_without_a_mode_left_behind() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.randint(50, (1, 3))
    steps = stream(model, ids, 4)
    first = next(steps)
    assert first.shape == (1, 1)
    assert not torch.is_inference_mode_enabled()
    assert len(list(steps)) == 3


def test_no_new_tokens_are_the_prompt() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()), torch.randint(50, (1, 3))
    assert torch.equal(generate(model, ids, 0), ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"document_ids": torch.tensor([[0, 0, -1]])}, "pad on the left"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=words):
        generate(model, ids, **{"max_new_tokens": 2, **options})
