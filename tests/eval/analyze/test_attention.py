"""Do kinds of heads differ? The bootstrap against loops and scipy, and heads made to differ."""

import math

import numpy as np
import pytest
import torch

from ropepp.eval.analyze.attention import (
    DIFFERENCE,
    PAIRED,
    bootstrap,
    compare_kinds,
    percentiles,
)
from ropepp.eval.analyze.attention_maps import MEASURES, AttentionMaps, attention_maps
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import RoPE, RoPEppEC

L, B = 3, 12
LAYOUT = RoPEppEC().layout(4, 2)


def maps_of(by_head: np.ndarray) -> AttentionMaps:
    """Maps that have nothing but measures, (rows, L, heads, measures)."""
    return AttentionMaps({}, 64, 1, {}, torch.from_numpy(by_head))


def lines(table: list[dict], kind: str, measure: str) -> dict:
    found = {x["layer"]: x for x in table if (x["kind"], x["measure"]) == (kind, measure)}
    assert found
    return found


def test_bootstrap_by_a_loop() -> None:
    values = np.random.default_rng(1).normal(size=(9, 2, 3))
    means = bootstrap(values, resamples=50, seed=4)
    drawn = np.random.default_rng(4).integers(9, size=(50, 9))
    for mean, rows in zip(means, drawn, strict=True):
        total = np.zeros((2, 3))
        for row in rows:
            total += values[row]
        np.testing.assert_allclose(mean, total / 9)
    low, high = percentiles(means)
    assert low[1, 2] == pytest.approx(np.percentile(means[:, 1, 2], 2.5))
    assert high[1, 2] == pytest.approx(np.percentile(means[:, 1, 2], 97.5))


def test_bootstrap_by_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).exponential(size=40)
    found = percentiles(bootstrap(values[:, None], resamples=40_000))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found[0][0] == pytest.approx(expected.low, abs=0.01)
    assert found[1][0] == pytest.approx(expected.high, abs=0.01)


def test_means_and_differences() -> None:
    by_head = np.random.default_rng(3).normal(size=(B, L, 8, 4))
    table = compare_kinds(maps_of(by_head), LAYOUT)
    for j, measure in enumerate(MEASURES):
        for layer in range(L):
            real, imaginary = (by_head[:, layer, k::2, j].mean() for k in (0, 1))
            for kind, mean in (
                ("real", real),
                ("imaginary", imaginary),
                (DIFFERENCE, imaginary - real),
            ):
                line = lines(table, kind, measure)[layer + 1]
                assert line["mean"] == pytest.approx(mean)
                assert line["low"] < mean < line["high"]
        line = lines(table, DIFFERENCE, measure)["all"]
        assert line["mean"] == pytest.approx(
            (by_head[:, :, 1::2] - by_head[:, :, ::2])[..., j].mean()
        )
        assert line["wide_low"] < line["low"]
        assert line["high"] < line["wide_high"]
        assert lines(table, "real", measure)["all"]["wide_low"] is None


def test_rows_are_kept_together() -> None:
    """What both kinds share in a row, however large, is no uncertainty of their difference."""
    rng = np.random.default_rng(4)
    by_head = np.zeros((B, L, 8, 4)) + 100 * rng.normal(size=(B, 1, 1, 1))
    by_head[:, :, 1::2] += 1 + 0.01 * rng.normal(size=(B, L, 4, 4))
    table = compare_kinds(maps_of(by_head), LAYOUT)
    line = lines(table, DIFFERENCE, "entropy")["all"]
    assert 0.98 < line["wide_low"] < line["wide_high"] < 1.02
    line = lines(table, "real", "entropy")["all"]
    assert line["high"] - line["low"] > 50


def test_heads_that_differ_at_random_show_over_texts_and_not_over_pairs() -> None:
    """Any two groups of heads differ on enough text; kinds differ only if pairs agree."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(5)
    by_head = rng.normal(size=(1, L, 8, 4)) + 1e-3 * rng.normal(size=(B, L, 8, 4))
    table = compare_kinds(maps_of(by_head), LAYOUT)
    apart = 0
    for j, measure in enumerate(MEASURES):
        line = lines(table, DIFFERENCE, measure)["all"]
        apart += not line["wide_low"] <= 0 <= line["wide_high"]
        paired = lines(table, PAIRED, measure)["all"]
        assert paired["mean"] == pytest.approx(line["mean"])
        assert paired["wide_low"] <= 0 <= paired["wide_high"]
        differences = (by_head[:, :, 1::2] - by_head[:, :, ::2]).mean(0)[..., j].ravel()
        ends = stats.t.interval(0.95, 3 * 4 - 1, differences.mean(), stats.sem(differences))
        assert (paired["low"], paired["high"]) == pytest.approx(ends)
    assert apart == 4


def test_without_imaginary_heads_there_is_no_difference() -> None:
    by_head = np.random.default_rng(3).normal(size=(B, L, 4, 4))
    table = compare_kinds(maps_of(by_head), RoPE().layout(4, 2))
    assert {line["kind"] for line in table} == {"real"}


def test_heads_made_to_look_far() -> None:
    """Imaginary heads whose scores all grow with the distance, by hand: keys constant, so that the
    score is a_n sin(f_n d); the shared query favours sin up to a quarter turn."""
    config = ModelConfig(31, 8, 1, 1, 1, 8, head_size=2)
    model = Transformer(config, RoPEppEC(theta=1e4), seed=0).requires_grad_(False)
    attention = model.blocks()[0].self_attn
    model.embed_tokens.weight.fill_(1.0)
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    attention.q_proj.weight[0] = 1.0  # q = k = (c, 0): a = c^2, b = 0
    attention.k_proj.weight[0] = 1.0
    ids = torch.randint(0, 31, (8, 3))  # distances 0 to 2, at one radian a token
    found = attention_maps(model, ids).by_head[0, 0]
    c2 = float(8 * 8) / math.sqrt(2)
    for head, function in ((0, math.cos), (1, math.sin)):
        far = 0.0
        for t in range(3):
            weights = [math.exp(c2 * (function(t - s) - 1)) for s in range(t + 1)]
            far += sum(w * (t - s) for s, w in enumerate(weights)) / sum(weights)
        assert float(found[head, 0]) == pytest.approx(far / 3, rel=1e-3, abs=1e-6)
    assert found[1, 0] > found[0, 0]
