"""The Triton kernel of losses and gradients, on a GPU or by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

HAS_TRITON = find_spec("triton") is not None
CASES = [(1, "float32"), (40, "float32"), (4096, "bfloat16"), (9001, "bfloat16"), (9001, "float32")]


def check(vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Against float64; a row that nearly leaves the range of exp, one that does not count, two
    whose targets are outside the vocabulary."""
    from ropepp.model.softmax_kernel import losses_and_gradient

    torch.manual_seed(0)
    logits = (3 * torch.randn(9, vocab_size, device=device)).to(dtype)
    logits[0, -1] = 300
    targets = torch.randint(vocab_size, (9,), device=device)
    targets[0], targets[2] = 0, -100
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (want.sum() + 0.01 * (exact.logsumexp(-1).square() * (targets >= 0)).sum()).backward()
    grad = logits.clone()
    losses = losses_and_gradient(grad, targets, -100, 0.01)
    torch.testing.assert_close(losses.double(), want.detach(), atol=1e-5, rtol=1e-6)
    rounding = 1e-5 if dtype == torch.float32 else 8e-3  # the interpreter truncates
    assert exact.grad is not None
    torch.testing.assert_close(grad.double(), exact.grad, atol=1e-6, rtol=rounding)
    targets[5], targets[7] = vocab_size, -1
    outside = losses_and_gradient(logits.clone(), targets, -100, 0.0).isnan().tolist()
    assert [row for row, is_nan in enumerate(outside) if is_nan] == [5, 7]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("vocab_size", "dtype"), CASES)
def test_interpreted(vocab_size: int, dtype: str) -> None:
    """In a process of its own: triton looks at the variable when it is imported."""
    call = f"import torch, test_softmax_kernel as t; t.check({vocab_size}, torch.{dtype}, 'cpu')"
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", call], check=True, env=os.environ | environment)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("vocab_size", "dtype"), [*CASES, (128256, "bfloat16")])
def test_on_a_gpu(vocab_size: int, dtype: str) -> None:
    check(vocab_size, getattr(torch, dtype), "cuda")
