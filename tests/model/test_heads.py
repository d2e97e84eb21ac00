"""The head table: what it accepts, what each variant makes of it, and the properties that it
promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepp.errors import InputError
from ropepp.model import Head, HeadLayout, ModelConfig, Transformer
from ropepp.model.heads import turn
from ropepp.model.positions import (
    HeadSplit,
    ImaginaryOnly,
    PartialDoubling,
    Phases,
    Position,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
)
from ropepp.model.positions.rotary import RotaryLayer, rotate


def rows(position: Position, heads: int, kv_heads: int) -> list[tuple[int, float, int]]:
    return [tuple(head) for head in position.layout(heads, kv_heads).heads]


def test_tables_of_the_variants() -> None:
    assert rows(RoPE(), 4, 2) == [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 1)]
    ec = [(0, 0, 0), (0, -90, 0), (1, 0, 0), (1, -90, 0), (2, 0, 1), (2, -90, 1)]
    assert rows(RoPEppEC(), 4, 2) == [*ec, (3, 0, 1), (3, -90, 1)]
    assert rows(RoPEppEH(), 4, 4) == [(0, 0, 0), (0, -90, 0), (1, 0, 1), (1, -90, 1)]
    assert rows(HeadSplit(), 4, 2) == [(0, 0, 0), (1, 0, 0), (2, -90, 1), (3, -90, 1)]
    interleaved = [(0, 0, 0), (1, -90, 0), (2, 0, 1), (3, -90, 1)]
    assert rows(HeadSplit(interleaved=True), 4, 2) == interleaved
    assert rows(ImaginaryOnly(), 2, 1) == [(0, -90, 0), (1, -90, 0)]
    assert rows(PartialDoubling(), 4, 2) == [
        *[(0, 0, 0), (0, -90, 0), (1, 0, 0)],
        *[(2, 0, 1), (2, -90, 1), (3, 0, 1)],
    ]
    assert rows(Phases(phases=(0.0, 30.0)), 1, 1) == [(0, 0, 0), (0, 30, 0)]


@pytest.mark.parametrize("count", range(9))
def test_any_number_of_imaginary_heads(count: int) -> None:
    for interleaved in (False, True):
        split = HeadSplit(imaginary_share=count / 8, interleaved=interleaved)
        phases = [head.phase for head in split.layout(8, 2).heads]
        assert phases.count(-90.0) == count


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([], "at least one head"),
        ([Head(0, 0, 0), Head(2, 0, 0)], "numbered 0, 1, 2"),
        ([Head(0, 0, 0), Head(0, -90, 0), Head(1, 0, 1)], r"\[2, 1\]"),
        ([Head(0, 0, 0), Head(1, 0, 1), Head(2, 0, 0), Head(3, 0, 1)], "order of their kv heads"),
        ([Head(0, 0, 0), Head(1, 0, 2)], "serve"),
        ([Head(0, math.nan, 0)], "phase"),
    ],
)
def test_tables_that_a_grouped_kernel_would_mix(heads: list[Head], words: str) -> None:
    with pytest.raises(InputError, match=words):
        HeadLayout(tuple(heads))


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (RoPEppEH(), "num_kv_heads 3 must both be even"),
        (PartialDoubling(doubled_share=1 / 6), "do not divide over 3 kv heads"),
        (HeadSplit(imaginary_share=0.4), r"imaginary_share is 0.4; of 6 heads it can be 0/6, 1/6"),
        (HeadSplit(imaginary_share=1.5), "imaginary_share is 1.5"),
    ],
)
def test_variants_that_do_not_fit_the_sizes(position: Position, words: str) -> None:
    with pytest.raises(InputError, match=words):
        position.layout(6, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RoPE(theta=0), "theta is 0"),
        (lambda: RoPE(rotary_share=0), "rotary_share is 0"),
        (lambda: Phases(phases=()), "phases is empty"),
        (lambda: RoPE().rotary_dim(7), "7 of 7 head components"),
        (lambda: Pythia().rotary_dim(12), "3 of 12 head components"),
        (lambda: ModelConfig(8, 8, 1, 3, 2, 8), "num_heads is 3, num_kv_heads 2"),
        (lambda: ModelConfig(8, 8, 1, 3, 3, 8), "give head_size"),
        (lambda: ModelConfig(8, 8, 0, 2, 2, 8), "num_layers is 0"),
    ],
)
def test_values_out_of_range(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@given(phase=st.floats(-720, 720), turns=st.integers(-8, 8))
@settings(deadline=None, max_examples=50)
def test_turns_rotate_and_quarter_turns_copy(phase: float, turns: int) -> None:
    a, b = torch.randn(2, 5)
    x = torch.complex(a, b)
    got = torch.complex(*turn(a, b, phase))
    factor = torch.polar(torch.tensor(1.0), torch.tensor(math.radians(phase)))
    torch.testing.assert_close(got, x * factor, atol=1e-5, rtol=0)
    quarter = torch.view_as_real(torch.complex(*turn(a, b, 90.0 * turns)))
    assert torch.equal(quarter.abs().sort().values, torch.stack((a, b), 1).abs().sort().values)


@st.composite
def layouts(draw: st.DrawFn) -> HeadLayout:
    """Any table that is allowed: projections may even serve several kv heads."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    number = kv_heads * group
    chosen = draw(st.lists(st.integers(0, number - 1), min_size=number, max_size=number))
    dense = {p: i for i, p in enumerate(sorted(set(chosen)))}
    phases = st.sampled_from([0.0, -90.0, 90.0, 180.0, 30.0])
    return HeadLayout(tuple(Head(dense[p], draw(phases), i // group) for i, p in enumerate(chosen)))


@given(layout=layouts(), share=st.sampled_from([1.0, 0.5]))
@settings(deadline=None, max_examples=80)
def test_queries_of_any_table_equal_a_loop_over_its_heads(layout: HeadLayout, share: float) -> None:
    D, T = 8, 3
    rotary_dim = int(share * D)
    q = torch.randn(2, T, layout.num_projections, D)
    angles = torch.randn(1, T, rotary_dim // 2)
    table = angles.cos(), angles.sin()
    got, _ = RotaryLayer(layout, D, rotary_dim)(q, torch.randn(2, T, layout.num_kv_heads, D), table)
    assert got.shape == (2, T, layout.num_heads, D)
    for h, head in enumerate(layout.heads):
        shifted = angles[:, :, None] + math.radians(head.phase)
        own = q[:, :, head.projection : head.projection + 1]
        a, b = rotate(own[..., :rotary_dim], shifted.cos(), shifted.sin())
        want = torch.cat((a, b, own[..., rotary_dim:]), -1)
        torch.testing.assert_close(got[:, :, h : h + 1], want, atol=1e-5, rtol=0)


def test_scores_are_the_two_parts_of_one_complex_product() -> None:
    """A_re and A_im of the paper, from their sums over pairs."""
    D, T = 16, 12
    config = ModelConfig(8, D, 1, 1, 1, 8)
    q, k = torch.randn(2, 1, T, 1, D, dtype=torch.float64)
    table = RoPEppEC().table(torch.arange(T).unsqueeze(0), config)
    q_two, k_one = RoPEppEC().build(config, 0)(q.float(), k.float(), table)
    got = torch.einsum("bthd,bsxd->hts", q_two, k_one)
    f = RoPE().frequencies(D).double()
    pairs_q, pairs_k = (torch.complex(*x[0, :, 0].chunk(2, -1)) for x in (q, k))
    product = pairs_q[:, None] * pairs_k.conj()[None, :]
    distance = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).double()
    turned = product * torch.polar(torch.ones(1).double(), f * distance[..., None])
    torch.testing.assert_close(got[0], turned.real.sum(-1).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1], turned.imag.sum(-1).float(), atol=1e-4, rtol=0)


def small(position: Position, seed: int = 0) -> Transformer:
    return Transformer(ModelConfig(50, 32, 2, 4, 2, 48, init_std=0.3), position, seed=seed)


def turn_queries(model: Transformer, heads: list[int], head_dim: int) -> None:
    """W_q -> R(-90 degrees) W_q for the given heads."""
    for layer in model.layers:
        weight = layer.self_attn.q_proj.weight.data.unflatten(0, (-1, head_dim))
        for h in heads:
            weight[h] = torch.cat(turn(*weight[h].chunk(2, 0), -90.0), 0)


@pytest.mark.parametrize(
    "position",
    [HeadSplit(), HeadSplit(interleaved=True), HeadSplit(imaginary_share=0.25), ImaginaryOnly()],
)
def test_separate_imaginary_heads_are_rope_in_other_coordinates(position: Position) -> None:
    ids = torch.randint(50, (2, 20))
    split, rope = small(position), small(RoPE())
    assert not torch.allclose(split(ids), rope(ids), atol=1e-2)
    turn_queries(rope, [h.projection for h in split.layout.heads if h.phase], 8)
    torch.testing.assert_close(rope(ids), split(ids), atol=1e-5, rtol=0)


def test_shared_imaginary_heads_are_not_rope() -> None:
    """Turning EC's query matrices turns both heads of a projection: phases 0, -90 become -90,
    180."""
    ids = torch.randint(50, (2, 20))
    ec, turned = small(RoPEppEC()), small(RoPEppEC())
    turn_queries(turned, range(4), 8)
    assert not torch.allclose(ec(ids), turned(ids), atol=1e-2)
    shifted = small(Phases(phases=(-90.0, 180.0)))
    torch.testing.assert_close(shifted(ids), turned(ids), atol=1e-5, rtol=0)


def test_opposite_shared_phases_are_the_same_function_class() -> None:
    """{0, +90} equals {0, -90}: turn the queries and swap the heads in the output projection."""
    ids = torch.randint(50, (2, 20))
    plus, minus = small(Phases(phases=(0.0, 90.0))), small(Phases(phases=(0.0, -90.0)))
    turn_queries(plus, range(4), 8)
    for layer in plus.layers:
        weight = layer.self_attn.o_proj.weight.data
        weight.copy_(weight.unflatten(1, (4, 2, 8)).flip(2).flatten(1))
    torch.testing.assert_close(plus(ids), minus(ids), atol=1e-5, rtol=0)
