"""Cached decoding equals full recomputation, for every variant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transformer import ALL, CONFIG

from ropepp.errors import InputError
from ropepp.generate import generate
from ropepp.model import Transformer
from ropepp.model.cache import KVCache
from ropepp.model.positions import PI, FoPE, Position, RoPEppEC, YaRN

SCALED = [RoPEppEC(scaling=PI(4.0)), RoPEppEC(scaling=YaRN(4.0, 16)), FoPE(scaling=PI(2.0))]


@pytest.mark.parametrize("position", ALL + SCALED, ids=lambda p: type(p).__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=8)
def test_chunks_through_the_cache_equal_one_pass(position: Position, data: st.DataObject) -> None:
    model = Transformer(CONFIG, position).eval()
    chunks = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    T = sum(chunks)
    ids = torch.randint(50, (2, T), generator=torch.Generator().manual_seed(T))
    documents, positions = None, None
    if data.draw(st.booleans()):
        padding = data.draw(st.lists(st.integers(0, T - 1), min_size=2, max_size=2))
        documents = -(torch.arange(T) < torch.tensor(padding)[:, None]).long()
        positions = ((documents >= 0).cumsum(1) - 1).clamp(min=0)
    elif data.draw(st.booleans()):
        positions = torch.randint(0, 60, (2, T)).sort(1).values
    want = model(ids, positions, documents)
    cache, parts = KVCache(CONFIG.num_layers), []
    for part in torch.arange(T).split(chunks):
        given = [x if x is None else x[:, part] for x in (positions, documents)]
        parts.append(model(ids[:, part], *given, cache=cache))
    seen = torch.ones(2, T, dtype=torch.bool) if documents is None else documents >= 0
    assert cache.length == T
    assert cache.layers[0].keys.shape == (2, T, model.layout.num_kv_heads, 8)
    torch.testing.assert_close(torch.cat(parts, 1)[seen], want[seen], atol=5e-5, rtol=0)


def test_padded_prompts_continue_as_they_would_alone() -> None:
    model = Transformer(CONFIG, RoPEppEC()).eval()
    short, long = torch.randint(50, (1, 3)), torch.randint(50, (1, 8))
    ids = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), 1), long))
    documents = torch.tensor([[-1] * 5 + [0] * 3, [0] * 8])
    tokens = generate(model, ids, 6, document_ids=documents)
    assert torch.equal(tokens[:1, 5:], generate(model, short, 6))
    assert torch.equal(tokens[1:], generate(model, long, 6))


def test_a_prompt_that_ends_with_padding_is_refused() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="pad on the left"):
        generate(model, ids, 2, document_ids=torch.tensor([[0, 0, -1]]))
    with pytest.raises(InputError, match="temperature is -1"):
        generate(model, ids, 2, temperature=-1)
