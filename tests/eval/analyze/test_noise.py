"""Noise on queries: what is added where, that draws are paired, and the intervals by scipy."""

import pytest
import torch
from torch import Tensor

from ropepp.errors import InputError
from ropepp.eval.analyze.noise import (
    UnitNoise,
    effects,
    mean_loss,
    noise_study,
    noisy_queries,
)
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import ImaginaryOnly, RoPE, RoPEppEC

CONFIG = ModelConfig(31, 32, 2, 4, 2, 24, init_std=0.4)


def make(position: RoPE | None = None) -> tuple[Transformer, Tensor]:
    model = Transformer(CONFIG, position or RoPEppEC(), seed=3).requires_grad_(False)
    return model, torch.randint(0, 31, (2, 9))


def queries(model: Transformer, ids: Tensor) -> list[Tensor]:
    """Rotated queries of each layer, noise included."""
    found: list[Tensor] = []
    handles = [
        block.self_attn.position.register_forward_hook(lambda m, a, out: found.append(out[0]))
        for block in model.blocks()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("kind", "heads"), [("real", [0, 2, 4, 6]), ("imaginary", [1, 3, 5, 7])])
def test_noise_is_added_to_these_heads_alone(kind: str, heads: list[int]) -> None:
    model, ids = make()
    clean = queries(model, ids)[0]
    with noisy_queries(model, 0.5, kind, UnitNoise(7)):
        noisy = queries(model, ids)[0]
    change = noisy - clean
    expected = 0.5 * UnitNoise(7)(kind, 0, clean[:, :, heads].shape)
    torch.testing.assert_close(change[:, :, heads], expected, rtol=0, atol=1e-5)
    others = [h for h in range(8) if h not in heads]
    assert torch.equal(noisy[:, :, others], clean[:, :, others])
    assert torch.equal(queries(model, ids)[0], clean)  # the hooks are gone


def test_unit_noise_depends_on_seed_layer_and_pass() -> None:
    shape = torch.Size((40, 50, 2, 5))
    source = UnitNoise(1, 2)
    first, second = source("real", 0, shape), source("real", 0, shape)
    assert torch.equal(source("imaginary", 0, shape), first)  # paired
    assert torch.equal(UnitNoise(1, 2)("real", 0, shape), first)
    others = [second, source("real", 1, shape), UnitNoise(1, 3)("real", 0, shape)]
    others.append(UnitNoise(2, 2)("real", 0, shape))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.03
    assert abs(float(first.mean())) < 0.03
    assert float(first.std()) == pytest.approx(1, abs=0.02)


def test_study_without_noise_changes_nothing_and_with_noise_is_paired() -> None:
    model, ids = make()

    def measure() -> dict[str, float]:
        return mean_loss(model, ids[:, :-1], ids[:, 1:])

    before = measure()
    clean, values = noise_study(model, measure, [0.0, 0.7], draws=3, seed=5)
    assert clean == before == measure()
    assert set(values) == {"loss", "perplexity", "accuracy"}
    loss = values["loss"]
    assert set(loss) == {("real", 0.0), ("imaginary", 0.0), ("real", 0.7), ("imaginary", 0.7)}
    assert (
        set(loss["real", 0.0].values()) == set(loss["imaginary", 0.0].values()) == {before["loss"]}
    )
    for kind in ("real", "imaginary"):
        for draw in range(3):
            with noisy_queries(model, 0.7, kind, UnitNoise(5, draw)):
                assert measure()["loss"] == loss[kind, 0.7][draw]
        assert len(set(loss[kind, 0.7].values())) == 3


def test_mean_loss_written_out() -> None:
    model, ids = make()
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    found = mean_loss(model, ids[:, :-1], targets)
    logits = model(ids[:, :-1])
    kept = targets != -100
    nll = -logits.log_softmax(-1)[kept].gather(-1, targets[kept].unsqueeze(-1))
    assert found["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert found["accuracy"] == float((logits.argmax(-1) == targets)[kept].double().mean())


def test_effects_by_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    real = {0: 1.2, 1: 1.5, 2: 1.1, 3: 1.45}
    imaginary = {0: 1.4, 1: 1.9, 2: 1.2, 3: 1.95}
    equal = dict.fromkeys(range(4), 1.0)
    values = {
        "loss": {
            ("real", 0.0): equal,
            ("imaginary", 0.0): equal,
            ("real", 0.5): real,
            ("imaginary", 0.5): imaginary,
            ("real", 1.0): imaginary,
            ("imaginary", 1.0): real,
        }
    }
    none, half, full = effects({"loss": 1.0}, values)  # type: ignore[arg-type]
    assert (none["real"], none["imaginary"], none["difference"]) == (0, 0, 0)
    assert (none["low"], none["high"], none["verdict"]) == (0, 0, "identical")
    for key, own in (("real", real), ("imaginary", imaginary)):
        changes = [value - 1.0 for value in own.values()]
        mean, error = sum(changes) / 4, stats.sem(changes)
        assert half[key] == pytest.approx(mean)
        ends = stats.t.interval(0.95, 3, mean, error)
        assert (half[f"{key}_low"], half[f"{key}_high"]) == pytest.approx(ends)
    test = stats.ttest_rel(list(imaginary.values()), list(real.values()))
    ends = test.confidence_interval(0.95)
    assert half["difference"] == pytest.approx(0.3)
    assert (half["low"], half["high"]) == pytest.approx((ends.low, ends.high))
    assert half["p_holm"] == pytest.approx(3 * test.pvalue)  # of three tests, two equal
    assert full["difference"] == pytest.approx(-0.3)
    assert full["p_holm"] == pytest.approx(half["p_holm"])


def test_bad_input() -> None:
    model, _ = make()

    def measure() -> dict[str, float]:
        raise AssertionError("errors come before work")

    with pytest.raises(InputError, match="draws is 1"):
        noise_study(model, measure, [0.5], draws=1)
    for stds in ([], [-0.1], [0.5, 0.5], [float("nan")]):
        with pytest.raises(InputError, match="stds are"):
            noise_study(model, measure, stds, draws=3)
    with pytest.raises(InputError, match="RoPE, which has no imaginary heads"):
        noise_study(make(RoPE())[0], measure, [0.5], draws=3)
    with pytest.raises(InputError, match="has no real heads"):
        noise_study(make(ImaginaryOnly())[0], measure, [0.5], draws=3)
