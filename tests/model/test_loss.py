"""The chunked cross entropy against the naive one."""

import pytest
import torch

from ropepp.model.loss import (
    cross_entropy_and_hits,
    cross_entropy_sum,
    cross_entropy_sum_naive,
)


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [(), (0, 5, 6), tuple(range(21))])
def test_loss_and_gradients(rows: int, dtype: torch.dtype, ignored: tuple[int, ...]) -> None:
    hidden = torch.randn(3, 7, 16).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (3, 7))
    targets.view(-1)[list(ignored)] = -100
    results = []
    for loss in (
        cross_entropy_sum_naive(hidden, weight, targets),
        cross_entropy_sum(hidden, weight, targets, chunk_rows=rows),
    ):
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss / 5, (hidden, weight))))
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    )
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)


def test_gradients_agree_with_finite_differences() -> None:
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2, 3])
    loss = cross_entropy_sum(hidden, weight, targets, chunk_rows=2)
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
def test_evaluation_counts_hits(rows: int) -> None:
    hidden, weight = torch.randn(3, 7, 16), torch.randn(40, 16)
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = likeliest.where(torch.arange(21).view(3, 7) % 3 == 0, torch.zeros(()).long())
    targets[0] = -100
    loss, hits = cross_entropy_and_hits(hidden, weight, targets, chunk_rows=rows)
    assert hits == ((likeliest == targets) & (targets >= 0)).sum()
    naive = cross_entropy_sum_naive(hidden, weight, targets)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
