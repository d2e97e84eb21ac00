"""Cached decoding equals full recomputation, for every variant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.variants import ALL, CONFIG
from ropepp.errors import InputError
from ropepp.model import Transformer
from ropepp.model.cache import KVCache, LayerCache
from ropepp.model.positions import PI, FoPE, Position, RoPE, RoPEppEC, RoPEppEH, YaRN

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
    assert cache.layers[0].held[0].shape == (2, T, model.layout.num_kv_heads, 8)
    torch.testing.assert_close(torch.cat(parts, 1)[seen], want[seen], atol=5e-5, rtol=0)


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=5)
def test_cropped_and_reordered_rows_go_on_as_if_read_anew(
    position: Position, data: st.DataObject
) -> None:
    model = Transformer(CONFIG, position).eval()
    kept, cut, new = (data.draw(st.integers(1, 5)) for _ in range(3))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5)))
    ids = torch.randint(50, (3, kept + cut), generator=torch.Generator().manual_seed(kept))
    more = torch.randint(50, (len(rows), new), generator=torch.Generator().manual_seed(new))
    padding = data.draw(st.lists(st.integers(0, kept - 1), min_size=3, max_size=3))
    documents = -(torch.arange(kept + cut) < torch.tensor(padding)[:, None]).long()
    positions = ((documents >= 0).cumsum(1) - 1).clamp(min=0)
    cache = KVCache(CONFIG.num_layers, capacity=data.draw(st.sampled_from([0, 3, 300])))
    model(ids, positions, documents, cache)
    cache.crop(kept)
    cache.select(rows)
    own = positions[rows, kept - 1 : kept] + 1 + torch.arange(new)
    got = model(more, own, torch.zeros_like(more), cache)
    whole = torch.cat((ids[rows, :kept], more), 1)
    documents = torch.cat((documents[rows, :kept], torch.zeros_like(more)), 1)
    want = model(whole, torch.cat((positions[rows, :kept], own), 1), documents)[:, kept:]
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


@given(chunks=st.lists(st.integers(1, 400), min_size=1, max_size=6), capacity=st.integers(0, 600))
@settings(deadline=None, max_examples=25)
def test_buffers_hold_what_was_appended(chunks: list[int], capacity: int) -> None:
    cache, added = LayerCache(capacity), []
    for n in chunks:
        added.append((torch.randn(2, n, 3, 4), torch.randn(2, n, 3, 4)))
        k, v = cache.append(*added[-1])
    keys, values = (torch.cat(parts, 1) for parts in zip(*added, strict=True))
    assert torch.equal(k, keys)
    assert torch.equal(v, values)
    assert torch.equal(cache.held[0], keys)


def test_room_that_was_asked_for_is_taken_once() -> None:
    cache = LayerCache(500)
    cache.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
    place = cache.held[0].data_ptr()
    for _ in range(497):
        cache.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert cache.held[0].data_ptr() == place


@pytest.mark.parametrize(("position", "share"), [(RoPEppEC(), 1.0), (RoPEppEH(), 0.5)])
def test_bytes_are_those_of_kv_heads(position: Position, share: float) -> None:
    ids = torch.zeros(3, 7, dtype=torch.int64)
    sizes = []
    for spec in (RoPE(), position):
        model, cache = Transformer(CONFIG, spec).eval(), KVCache(CONFIG.num_layers)
        model(ids, cache=cache)
        sizes.append(cache.bytes)
    assert sizes[0] == CONFIG.num_layers * 2 * 3 * 7 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert sizes[1] == share * sizes[0]


def test_inference_mode_may_begin_and_end_within_a_cache() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.arange(12)[None]
    cache = KVCache(CONFIG.num_layers)
    with torch.inference_mode():
        model(ids[:, :4], cache=cache)
    model(ids[:, 4:8], cache=cache)
    with torch.inference_mode():
        got = model(ids[:, 8:], cache=cache)
    torch.testing.assert_close(got, model(ids)[:, 8:], atol=5e-5, rtol=0)


def test_bad_use_is_refused_in_words() -> None:
    model, cache = Transformer(CONFIG, RoPEppEC()), KVCache(CONFIG.num_layers)
    model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(InputError, match="crop to 4 tokens of 3"):
        cache.crop(4)
    with pytest.raises(InputError, match="holds 2 rows; found 1 rows"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)


@pytest.mark.slow
@pytest.mark.extra
def test_compiled_blocks_see_the_same_shapes_at_every_token() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.arange(20)[None]
    want = model(ids)
    for block in model.blocks():
        block.compile(dynamic=False)
    cache = KVCache(CONFIG.num_layers)
    with torch.no_grad():
        parts = [model(ids[:, :5], cache=cache), model(ids[:, 5:6], cache=cache)]
        with torch.compiler.set_stance("fail_on_recompile"):
            parts += [model(ids[:, i : i + 1], cache=cache) for i in range(6, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=5e-5, rtol=0)
