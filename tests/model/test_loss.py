"""The chunked cross entropy against the naive one, and that against the definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ropepp.model import loss as loss_module
from ropepp.model.loss import (
    cross_entropy_sum,
    cross_entropy_sum_naive,
    losses_and_gradient,
    token_losses,
)


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
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: rows)
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


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"),
    [(torch.float32, 1e-6, 3e-6), (torch.bfloat16, 1e-3, 5e-3)],
)
def test_against_float64(
    rows: int,
    z_loss: float,
    dtype: torch.dtype,
    of_value: float,
    of_gradient: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A vocabulary of several blocks of rows; relative errors in the L2 norm."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    hidden = torch.randn(37, 24).to(dtype).requires_grad_()
    weight = torch.randn(20_000, 24).div(5).to(dtype).requires_grad_()
    targets = torch.randint(20_000, (37,))
    targets[[0, 7, 8, 36]] = -100
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (h @ w.T)[targets >= 0]
    entropy = torch.nn.functional.cross_entropy(logits, targets[targets >= 0], reduction="sum")
    total = entropy + z_loss * logits.logsumexp(-1).square().sum()
    want = torch.autograd.grad(total / 3, (h, w))
    loss = cross_entropy_sum(hidden, weight, targets, z_loss=z_loss)
    assert loss.item() == pytest.approx(entropy.item(), rel=of_value)
    for got, exact in zip(torch.autograd.grad(loss / 3, (hidden, weight)), want, strict=True):
        assert got.dtype == dtype
        assert (got - exact).norm() < of_gradient * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_softmax_rounds_to_nothing(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 300.0, 299.0], [0.0, 1.0, -2.0], [-90.0, 0.0, 0.0]]).to(dtype)
    targets = torch.tensor([0, 0, 0])
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (want.sum() + 1e-3 * exact.logsumexp(-1).square().sum()).backward()
    assert exact.grad is not None
    got = losses_and_gradient(logits, targets, -100, 1e-3)
    torch.testing.assert_close(got.double(), want.detach(), atol=1e-5, rtol=1e-6)
    rounding = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.double(), exact.grad, atol=1e-6, rtol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_chunks_add_up_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand equal parts: a sum in bfloat16 would stand still at 256 of them."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 1)
    hidden, weight = torch.ones(1000, 4, dtype=dtype), torch.zeros(48, 4, requires_grad=True)
    cross_entropy_sum(hidden, weight, torch.zeros(1000).long()).backward()
    want = torch.full((48, 4), 1000 / 48)
    want[0] -= 1000
    assert weight.grad is not None
    torch.testing.assert_close(
        weight.grad, want, atol=0, rtol=1e-5 if dtype.itemsize == 4 else 4e-3
    )


def test_gradients_do_not_depend_on_who_shares_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: as many a time as there are threads changes no bit."""
    hidden, weight = torch.randn(50, 8), torch.randn(30_000, 8, requires_grad=True)
    targets = torch.randint(30_000, (50,))
    results = []
    for threads in (1, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        loss = cross_entropy_sum(hidden, weight, targets)
        results.append((loss, *torch.autograd.grad(loss, weight)))
    for others in zip(*results, strict=True):
        assert all(torch.equal(others[0], other) for other in others)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.randn(9, 8), torch.randint(9, (4,)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tokens_at_all() -> None:
    weight = torch.randn(9, 8, requires_grad=True)
    loss = cross_entropy_sum(torch.randn(0, 8), weight, torch.zeros(0).long())
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "logit_bytes", "on_gpu", "rows"),
    [
        (32768, 128256, 2, True, 8192),
        (32768, 128256, 4, True, 4096),
        (9000, 128256, 2, True, 4500),
        (2048, 8192, 2, False, 512),
        (600, 8192, 2, False, 300),
        (2610, 128256, 4, False, 261),
        (640, 10_000_000, 4, False, 64),
        (5, 8192, 2, False, 5),
        (0, 8192, 2, False, 1),
    ],
)
def test_chunks_by_memory(
    tokens: int, vocab_size: int, logit_bytes: int, on_gpu: bool, rows: int
) -> None:
    assert loss_module.chunk_rows(tokens, vocab_size, logit_bytes, on_gpu) == rows


@pytest.mark.parametrize("function", [cross_entropy_sum_naive, cross_entropy_sum])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(
    function: Callable[..., Tensor], factor: float
) -> None:
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
    loss = function(*inputs, targets, z_loss=0.03)
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-6)
    for got, exact in zip(torch.autograd.grad(factor * loss, inputs), want, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)


def test_value_does_not_depend_on_z_loss() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    weight, targets = torch.randn(9, 8, requires_grad=True), torch.randint(9, (6,))
    for function in (cross_entropy_sum_naive, cross_entropy_sum):
        plain, with_z = (function(hidden, weight, targets, z_loss=z) for z in (0.0, 10.0))
        assert torch.equal(plain, with_z)


def test_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 2)
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
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: rows)
    hidden, weight = torch.randn(3, 7, 16), torch.randn(40, 16)
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = likeliest.where(torch.arange(21).view(3, 7) % 3 == 0, torch.zeros(()).long())
    targets[0] = -100
    losses, hits = token_losses(hidden, weight, targets)
    assert torch.equal(hits, (likeliest == targets) & (targets >= 0))
    naive = cross_entropy_sum_naive(hidden, weight, targets)
    assert losses.sum().item() == pytest.approx(naive.item(), rel=1e-5)
    assert not losses[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_naive_on_a_gpu(dtype: torch.dtype, z_loss: float, frozen: bool) -> None:
    hidden = torch.randn(3, 50, 64, device="cuda", dtype=dtype, requires_grad=not frozen)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(1000, (3, 50), device="cuda")
    targets[0, ::3] = -100
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    results = []
    for function in (cross_entropy_sum_naive, cross_entropy_sum):
        loss = function(hidden, weight, targets, z_loss=z_loss)
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss / 5, inputs)))
    value, gradients = (1e-4, 1e-4) if dtype == torch.float32 else (3e-3, 2e-2)
    torch.testing.assert_close(results[1][0], results[0][0], atol=0, rtol=value)
    for want, got in zip(results[0][1:], results[1][1:], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() < gradients * want.abs().max()
