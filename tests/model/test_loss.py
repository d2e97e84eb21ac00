"""The chunked cross entropy against the naive one, and that against the definition."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from ropepp.errors import InputError
from ropepp.model import loss as loss_module
from ropepp.model.loss import (
    LOSSES,
    cross_entropy_sum,
    cross_entropy_sum_naive,
    token_losses,
)

LIGER = "liger_kernel.transformers.functional"


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [(), (0, 5, 6), tuple(range(21))])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients(
    rows: int,
    dtype: torch.dtype,
    ignored: tuple[int, ...],
    z_loss: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda on_gpu: rows)
    hidden = torch.randn(3, 7, 16).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (3, 7))
    targets.view(-1)[list(ignored)] = -100
    results = []
    for loss in (
        cross_entropy_sum_naive(hidden, weight, targets, z_loss=z_loss),
        cross_entropy_sum(hidden, weight, targets, z_loss=z_loss),
    ):
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss / 5, (hidden, weight))))
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    )
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(backend: str, factor: float) -> None:
    """Against the formula in float64."""
    hidden, weight = torch.randn(2, 5, 16), torch.randn(40, 16)
    targets = torch.randint(40, (2, 5))
    targets[1, :3] = -100
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    logsumexp = (h @ w.T).logsumexp(-1)
    likely = (h @ w.T).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counts = targets >= 0
    entropy = (logsumexp - likely)[counts].sum()
    total = entropy + 0.03 * logsumexp[counts].square().sum()
    want = torch.autograd.grad(factor * total, (h, w))

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy_sum(*inputs, targets, z_loss=0.03, backend=backend)
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-6)
    for got, exact in zip(torch.autograd.grad(factor * loss, inputs), want, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def test_value_does_not_depend_on_z_loss() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    weight, targets = torch.randn(9, 8, requires_grad=True), torch.randint(9, (6,))
    for backend in ("naive", "chunked"):
        plain, with_z = (
            cross_entropy_sum(hidden, weight, targets, z_loss=z, backend=backend)
            for z in (0.0, 10.0)
        )
        assert torch.equal(plain, with_z)


def test_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda on_gpu: 2)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2, 3])
    loss = cross_entropy_sum(hidden, weight, targets)
    for x, grad in zip((hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True):
        direction = torch.randn_like(x)
        step = 1e-3
        ends = []
        for sign in (step, -step):
            moved = [y + sign * direction if y is x else y for y in (hidden, weight)]
            ends.append(cross_entropy_sum_naive(*(m.detach() for m in moved), targets))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope.item() == pytest.approx((grad * direction).sum().item(), rel=2e-3, abs=2e-3)


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8, requires_grad=True)
    targets = torch.randint(9, (4,))
    cross_entropy_sum(hidden, weight, targets).backward()
    assert weight.grad is not None
    with torch.no_grad():
        value = cross_entropy_sum(hidden, weight, targets)
    assert value.item() == pytest.approx(
        cross_entropy_sum_naive(hidden, weight, targets).item(), abs=1e-4
    )


@pytest.mark.parametrize("target", [-1, 40])
def test_targets_outside_the_vocabulary_raise(target: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        cross_entropy_sum(torch.randn(1, 4), torch.randn(40, 4), torch.tensor([target]))


@pytest.mark.parametrize("rows", [2, 64])
def test_evaluation_counts_hits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda on_gpu: rows)
    hidden, weight = torch.randn(3, 7, 16), torch.randn(40, 16)
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = likeliest.where(torch.arange(21).view(3, 7) % 3 == 0, torch.zeros(()).long())
    targets[0] = -100
    losses, hits = token_losses(hidden, weight, targets)
    assert torch.equal(hits, (likeliest == targets) & (targets >= 0))
    naive = cross_entropy_sum_naive(hidden, weight, targets)
    assert losses.sum().item() == pytest.approx(naive.item(), rel=1e-5)
    assert not losses[0].any()


def test_what_is_not_allowed_is_named() -> None:
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 4])
    with pytest.raises(InputError, match="'fast'; allowed: chunked, naive, liger"):
        cross_entropy_sum(hidden, weight, targets, backend="fast")
    with pytest.raises(InputError, match="z_loss is -1"):
        cross_entropy_sum(hidden, weight, targets, z_loss=-1.0)
    assert list(LOSSES) == ["chunked", "naive", "liger"]


def test_liger_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 4])
    monkeypatch.setitem(sys.modules, LIGER, None)
    with pytest.raises(InputError, match=r"liger-kernel is missing .* choose chunked or naive"):
        cross_entropy_sum(*inputs, backend="liger")
    present = ModuleType(LIGER)
    present.liger_fused_linear_cross_entropy = None
    monkeypatch.setitem(sys.modules, LIGER, present)
    with pytest.raises(InputError, match=r"needs CUDA tensors, but these are on cpu"):
        cross_entropy_sum(*inputs, backend="liger")


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("frozen", [False, True])
def test_liger_equals_naive(dtype: torch.dtype, z_loss: float, frozen: bool) -> None:
    hidden = torch.randn(3, 50, 64, device="cuda", dtype=dtype, requires_grad=not frozen)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(1000, (3, 50), device="cuda")
    targets[0, ::3] = -100
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    results = []
    for backend in ("naive", "liger"):
        loss = cross_entropy_sum(hidden, weight, targets, z_loss=z_loss, backend=backend)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss / 5, inputs)))
    value, gradients = (1e-4, 1e-4) if dtype == torch.float32 else (3e-3, 2e-2)
    torch.testing.assert_close(results[1][0], results[0][0], atol=0, rtol=value)
    for want, got in zip(results[0][1:], results[1][1:], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() < gradients * want.abs().max()
