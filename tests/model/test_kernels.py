"""The backends that run on a CPU against the definition."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_mask

from ropepp.model.documents import Documents, Recent
from ropepp.model.kernels import BACKENDS, Backend, attention, flex, fused

FAST = ["sdpa", "plain"]
HEADS = [(4, 4), (4, 2), (8, 1), (6, 3)]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of other devices than a CPU, where torch has no better one."""

    def choice(request: fused.Request, T: int) -> fused.Kernel:
        return fused.PLAIN

    passes = (partial(function, choice=choice) for function in (fused.forward, fused.backward))
    monkeypatch.setitem(BACKENDS, "plain", Backend("plain", lambda request: None, *passes))


def qkv(B: int, T: int, S: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, H, 16), (B, S, K, 16), (B, S, K, 16)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def boundaries(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def ids_of(B: int, T: int, S: int) -> tuple[Tensor, Tensor]:
    """Ids of queries, which are the last of the keys, and of keys."""
    ids = torch.randint(2, (B, S))
    return ids[:, S - T :], ids


def agree(backend: str, inputs: list[Tensor], **options: Any) -> None:
    """Outputs and gradients of a backend are the definition's."""
    results = []
    for name in ("reference", backend):
        out = attention(*inputs, backend=name, **options)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        results.append((out, *gradients))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_the_definition_is_torchs() -> None:
    q, k, v = qkv(2, 9, 9, 4, 2)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    got = attention(q, k, v, backend="reference")
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("T", "S", "causal", "sizes"),
    [
        (12, 12, True, None),
        (12, 12, False, None),
        (1, 12, True, None),
        (5, 12, True, None),
        (12, 12, True, [12, 12]),
        (12, 12, True, [3, 9, 12]),
        (12, 12, True, [4, 4, 4, 1, 10, 1]),
        (12, 12, False, [4, 4, 4, 5, 7]),
    ],
)
def test_outputs_and_gradients(
    backend: str,
    alibi: bool,
    heads: tuple[int, int],
    T: int,
    S: int,
    causal: bool,
    sizes: list[int] | None,
) -> None:
    slopes = torch.rand(heads[0]) if alibi else None
    bounds = None if sizes is None else boundaries(sizes)
    agree(
        backend,
        qkv(2, T, S, *heads),
        causal=causal,
        cu_seqlens=bounds,
        alibi_slopes=slopes,
        scale=0.3,
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("T", [1, 4, 9])
def test_hidden_keys(backend: str, alibi: bool, T: int) -> None:
    q, k, v = qkv(2, T, 9, 4, 2)
    ids = ids_of(2, T, 9)
    slopes = torch.rand(4) if alibi else None
    want, got = (
        attention(q, k, v, document_ids=ids, alibi_slopes=slopes, backend=name)
        for name in ("reference", backend)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    moved = torch.where((ids[1] == 1)[..., None, None], k.detach() + 100.0, k)
    near, far = (attention(q, x, v, document_ids=ids, backend=backend) for x in (k, moved))
    assert torch.equal(near[ids[0] != 1], far[ids[0] != 1])
    assert not torch.equal(near, far)


@pytest.mark.parametrize("alibi", [False, True])
def test_components_that_lie_apart_in_memory(alibi: bool) -> None:
    """Strides of several components, of whole heads and of none."""
    slopes = torch.rand(4) if alibi else None
    q = torch.randn(2, 9, 16, 4).transpose(-1, -2)
    k, v = torch.randn(2, 9, 2, 32)[..., ::2], torch.randn(2, 9, 2, 1).expand(2, 9, 2, 16)
    for bounds in (None, boundaries([9, 4, 5])):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        agree("sdpa", inputs, cu_seqlens=bounds, alibi_slopes=slopes)
        with torch.no_grad():
            found = [
                attention(*inputs, cu_seqlens=bounds, alibi_slopes=slopes, backend=name)
                for name in ("reference", "sdpa")
            ]
        torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_stays_near_float32(backend: str) -> None:
    inputs = qkv(1, 32, 32, 4, 2, torch.bfloat16)
    want = attention(*(x.float() for x in inputs), backend="reference")
    got = attention(*inputs, backend=backend)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=0)


def test_two_batches_of_documents_equal_their_own_calls() -> None:
    """A brute-force loop over documents, independent of any mask."""
    q, k, v = qkv(2, 10, 10, 4, 2)
    bounds = [0, 4, 10, 13, 20]
    got = attention(q, k, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    parts = [
        attention(*(x[a:b].unsqueeze(0) for x in flat), backend="reference")[0]
        for a, b in pairwise(bounds)
    ]
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(parts), atol=1e-5, rtol=0)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Queries and keys of each document: none of both, keys alone, or at least as many keys."""
    kinds = st.sampled_from(["nothing", "keys", "one", "square", "late"])
    sizes, sizes_k = [], []
    for kind in draw(st.lists(kinds, min_size=1, max_size=6)):
        n, more = draw(st.integers(2, 7)), draw(st.integers(1, 5))
        size = {"nothing": 0, "keys": 0, "one": 1}.get(kind, n)
        sizes.append(size)
        sizes_k.append({"nothing": 0, "square": n}.get(kind, size + more))
    if not sum(sizes):
        sizes, sizes_k = [*sizes, 2], [*sizes_k, 3]
    return sizes, sizes_k


@settings(max_examples=40, deadline=None)
@given(
    documents(), st.sampled_from(HEADS), st.booleans(), st.booleans(), st.integers(1, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_documents_with_keys_of_their_own(
    sizes: tuple[list[int], list[int]],
    heads: tuple[int, int],
    alibi: bool,
    causal: bool,
    B: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    own, own_k = (each * B for each in sizes)
    inputs = qkv(B, sum(own) // B, sum(own_k) // B, *heads)
    options = {
        "cu_seqlens": boundaries(own),
        "cu_seqlens_k": boundaries(own_k),
        "alibi_slopes": torch.rand(heads[0]) if alibi else None,
        "causal": causal,
    }
    for backend in FAST:
        agree(backend, inputs, **options)
    with torch.no_grad():
        want, got = (attention(*inputs, backend=name, **options) for name in ("reference", "flex"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_definition_of_documents_is_a_loop_over_them() -> None:
    q, k, v = qkv(2, 6, 9, 4, 2)
    bounds, bounds_k = [0, 4, 4, 4, 9, 12], [0, 4, 7, 7, 15, 18]
    slopes = torch.rand(4)
    got = attention(
        q,
        k,
        v,
        cu_seqlens=torch.tensor(bounds),
        cu_seqlens_k=torch.tensor(bounds_k),
        alibi_slopes=slopes,
        backend="reference",
    )
    parts = []
    for (a, b), (c, d) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        if b > a:
            own = (x.flatten(0, 1)[None, s:e] for x, s, e in ((q, a, b), (k, c, d), (v, c, d)))
            parts.append(attention(*own, alibi_slopes=slopes, backend="reference")[0])
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(parts), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("T", "S", "causal"), [(10, 17, True), (9, 9, True), (7, 11, False)])
def test_queries_in_chunks(
    alibi: bool, hidden: bool, T: int, S: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK", 4)
    ids = ids_of(2, T, S) if hidden else None
    slopes = torch.rand(6) if alibi else None
    for backend in FAST:
        options = {"causal": causal, "alibi_slopes": slopes, "document_ids": ids}
        agree(backend, qkv(2, T, S, 6, 3), **options)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks that the CPU's kernel is called with."""
    original, seen = fused.CPU, []

    def record(rows: fused.Rows) -> Any:
        seen.append(rows.mask)
        return original.forward(rows)

    monkeypatch.setattr(fused, "CPU", replace(original, forward=record))
    return seen


def test_no_mask_of_all_queries_and_keys(
    masks: list[Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK", 4)
    attention(*qkv(2, 12, 20, 4, 2), alibi_slopes=torch.rand(4))
    assert [mask.shape[-2:] for mask in masks if mask is not None] == [(4, 12), (4, 16), (4, 20)]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("T", "S"), [(2, 3), (5, 64), (70, 71), (33, 600)])
def test_later_queries_need_no_mask(
    grad: bool, heads: tuple[int, int], T: int, S: int, masks: list[Tensor | None]
) -> None:
    if grad:
        agree("sdpa", qkv(2, T, S, *heads))
    else:
        inputs = [x.detach() * 3 for x in qkv(2, T, S, *heads)]
        agreed = [attention(*inputs, backend=name) for name in ("reference", "sdpa")]
        torch.testing.assert_close(*agreed, atol=2e-5, rtol=1e-4)
    assert masks == [None, None]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_one_query_takes_its_heads_for_positions(
    heads: tuple[int, int], alibi: bool, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = F.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append({"q": q, "k": k, **options})
        return original(q, k, v, **options)

    (H, K), S = heads, 13
    ids = ids_of(3, 1, S) if hidden else None
    inputs = qkv(3, 1, S, H, K)
    options = {"alibi_slopes": torch.rand(H) if alibi else None, "document_ids": ids}
    agree("sdpa", inputs, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with torch.no_grad():
        want, got = (attention(*inputs, backend=name, **options) for name in ("reference", "sdpa"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    (call,) = calls
    assert call["q"].shape == (3, K, H // K, 16)
    assert call["k"].data_ptr() == inputs[1].data_ptr()  # not repeated
    assert not call["is_causal"]
    assert not call["enable_gqa"]


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "causal", "sizes"),
    [
        (12, 12, True, None),
        (12, 12, False, None),
        (5, 140, True, None),
        (1, 9, True, None),
        (12, 12, True, [3, 9, 4, 8]),
        (130, 130, False, [100, 160]),
    ],
)
def test_flex_without_gradients(
    alibi: bool, T: int, S: int, causal: bool, sizes: list[int] | None
) -> None:
    slopes = torch.rand(4) if alibi else None
    bounds = None if sizes is None else boundaries(sizes)
    inputs = qkv(2, T, S, 4, 2)
    with torch.no_grad():
        want, got = (
            attention(*inputs, causal=causal, cu_seqlens=bounds, alibi_slopes=slopes, backend=name)
            for name in ("reference", "flex")
        )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [None, [(7, 7), (0, 9), (1, 3), (12, 20), (5, 5), (0, 0), (8, 8)]]
)
def test_flex_blocks_are_where_the_mask_is(
    causal: bool, sizes: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompiled, the kernel looks at the mask alone; a GPU's skips blocks by these lists."""
    monkeypatch.setattr(flex, "BLOCK", 4)
    monkeypatch.setattr(flex, "_SEEN", Recent())
    T, S = (33, 52) if sizes else (21, 30)
    bounds, bounds_k = (boundaries([size[i] for size in sizes]) if sizes else None for i in (0, 1))
    own, own_k = (None if x is None else Documents(x) for x in (bounds, bounds_k))
    request = fused.Request(*qkv(1, T, S, 2, 1), causal, own, own_k, None, None, 1.0)
    _, mask = flex._seen(request)
    shown = create_mask(mask.mask_mod, 1, 1, T, S, device="cpu")[0, 0]
    padded = F.pad(shown, (0, -S % 4, 0, -T % 4)).unflatten(1, (-1, 4)).unflatten(0, (-1, 4))
    some, every = padded.any(dim=3).any(dim=1), padded.all(dim=3).all(dim=1)
    partial, whole = (
        torch.stack(
            [
                torch.isin(torch.arange(some.shape[1]), row[:n])
                for row, n in zip(indices[0, 0], numbers[0, 0], strict=True)
            ]
        )
        for indices, numbers in (
            (mask.kv_indices, mask.kv_num_blocks),
            (mask.full_kv_indices, mask.full_kv_num_blocks),
        )
    )
    assert torch.equal(whole, every)
    assert not (partial & whole).any()
    assert torch.equal(some & (partial | whole), some)
    assert (partial | whole).sum() <= some.sum() + 2  # keys without queries lie between


def test_flex_fails_where_it_would_not_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    flex._compiled.cache_clear()
    compile_ = partial(torch.compile, backend="eager", dynamic=False)
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(flex_attention, "flex_attention", lambda x: x + 1)
    monkeypatch.setattr(flex, "KINDS", 12)
    kernel = flex._compiled()
    flex._compiled.cache_clear()
    for size in range(2, 14):  # more than the compiler's own limit
        assert kernel(torch.zeros(size)).sum() == size
    with pytest.raises(FailOnRecompileLimitHit):
        kernel(torch.zeros(14))
