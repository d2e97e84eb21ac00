"""Attention maps against the softmax written out, and that looking changes nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ropepp.eval.analyze.attention_maps import MEASURES, attention_maps, draw
from ropepp.eval.analyze.heads import kinds_of
from ropepp.model.config import ModelConfig
from ropepp.model.positions import (
    ALiBi,
    FoPE,
    NoPE,
    PartialDoubling,
    Phases,
    Position,
    RoPE,
    RoPEppEC,
    RoPEppEH,
)
from ropepp.model.transformer import Transformer

MODULE = "ropepp.eval.analyze.attention_maps"
CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=24,
    init_std=0.4,
)
VARIANTS = [
    RoPE(),
    RoPEppEC(),
    RoPEppEH(),
    PartialDoubling(),
    Phases(phases=(0.0, 45.0, -90.0)),
    FoPE(max_length=64),
    ALiBi(),
    NoPE(),
]
B, T = 2, 21


def make(position: Position) -> tuple[Transformer, Tensor]:
    return Transformer(CONFIG, position, seed=3), torch.randint(0, 31, (B, T))


def by_hand(model: Transformer, ids: Tensor) -> list[Tensor]:
    """Weights (B, H, T, T) of each layer, from the queries and keys that its position layer
    returns."""
    found: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]):
        q, k = output
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        distance = torch.arange(T)[:, None] - torch.arange(T)[None]
        if isinstance(model.position, ALiBi):
            slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(4)])
            scores = scores - slopes[:, None, None] * distance
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))

    handles = [b.self_attn.position.register_forward_hook(look) for b in model.blocks()]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("position", VARIANTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("block", [1, 8, 64])
def test_the_softmax_written_out(
    position: Position, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make(position)
    monkeypatch.setattr(f"{MODULE}.BLOCK", block)
    maps = attention_maps(model, ids)
    want = by_hand(model, ids)
    distance = (torch.arange(T)[:, None] - torch.arange(T)[None]).float()
    assert maps.bin_width == 1
    assert sum(maps.heads.values()) == model.layout.num_heads
    assert maps.by_head.shape == (B, 2, model.layout.num_heads, len(MEASURES))
    for layer, weights in enumerate(want):
        far = (weights * distance).sum(-1).mean(-1)  # (B, H)
        torch.testing.assert_close(maps.by_head[:, layer, :, 0].float(), far, rtol=1e-4, atol=1e-5)
        own = weights.diagonal(dim1=2, dim2=3).mean(-1)
        torch.testing.assert_close(maps.by_head[:, layer, :, 3].float(), own, rtol=1e-4, atol=1e-5)
    for kind, heads in kinds_of(model.layout).items():
        for layer, weights in enumerate(want):
            own = weights[:, heads]
            mean = own.mean((0, 1))
            got = maps.weights[kind][layer]
            torch.testing.assert_close(got.nan_to_num(0.0), mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got.nan_to_num(0.0).sum(-1), torch.ones(T))
            assert (got.isnan() == torch.ones(T, T).triu(1).bool()).all()
            entropy = -(own * own.clamp(min=1e-30).log()).sum(-1).mean()
            values = (
                (mean * distance).sum(-1).mean(),
                entropy,
                mean[:, 0].mean(),
                mean.diagonal().mean(),
            )
            for name, value in zip(MEASURES, values, strict=True):
                found = maps.measures[kind][name][layer]
                assert found == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("position", VARIANTS, ids=lambda p: type(p).__name__)
def test_the_model_stays_as_it_was(position: Position, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(position)
    seen: list[Tensor] = []
    hidden = model.hidden

    def listening(input_ids: Tensor) -> Tensor:
        seen.append(hidden(input_ids))
        return seen[-1]

    monkeypatch.setattr(model, "hidden", listening)
    with torch.no_grad():
        before = torch.cat([hidden(row) for row in ids.split(1)])
        attention_maps(model, ids)
        after = torch.cat([hidden(row) for row in ids.split(1)])
    assert torch.equal(torch.cat(seen), before)
    assert torch.equal(after, before)


def test_hooks_are_gone_after_an_error() -> None:
    model, _ = make(RoPEppEC())
    with pytest.raises(IndexError):
        attention_maps(model, torch.full((1, 4), 31))
    assert not any(block.self_attn.position._forward_hooks for block in model.blocks())


def test_bins_are_means_over_visible_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(RoPEppEC())
    fine = attention_maps(model, ids)
    monkeypatch.setattr(f"{MODULE}.BINS", 5)
    monkeypatch.setattr(f"{MODULE}.BLOCK", 4)
    coarse = attention_maps(model, ids)
    assert coarse.bin_width == 5
    for kind in ("real", "imaginary"):
        assert coarse.weights[kind].shape == (2, 5, 5)
        for i in range(5):
            for j in range(5):
                part = fine.weights[kind][:, 5 * i : 5 * i + 5, 5 * j : 5 * j + 5].flatten(1)
                got = coarse.weights[kind][:, i, j]
                assert got.isnan().all() if j > i else not got.isnan().any()
                torch.testing.assert_close(got, part.nanmean(1), equal_nan=True)
        assert coarse.measures[kind] == {
            name: pytest.approx(values) for name, values in fine.measures[kind].items()
        }


def test_uniform_attention() -> None:
    """Without any weight all heads look everywhere equally."""
    model, ids = make(RoPEppEC())
    with torch.no_grad():
        for block in model.blocks():
            block.self_attn.q_proj.weight.zero_()
    maps = attention_maps(model, ids)
    for kind in maps.weights:
        for name, value in maps.uniform().items():
            assert maps.measures[kind][name] == pytest.approx([value, value], rel=1e-5)


@pytest.mark.parametrize("position", [RoPE(), Phases(phases=(0.0, 45.0, -90.0))], ids=str)
def test_drawing(position: Position, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(f"{MODULE}.BINS", 8)
    maps = attention_maps(*make(position))
    draw(maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]
