"""The norm that all layers use, against torch's in float64."""

import pytest
import torch

from ropepp.model.attention import RMSNorm


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_norm_and_gradients(dtype: torch.dtype, bound: float, compiled: bool) -> None:
    """Heads of a projection, which lie apart in memory; relative errors in the L2 norm."""
    norm = RMSNorm(64, 1e-2)
    torch.nn.init.normal_(norm.weight)
    # Two roundings of bfloat16, of x' and of its product with the weight, as in Llama.
    norm.weight.data = norm.weight.data.bfloat16().float()
    call = torch.compile(norm, fullgraph=True) if compiled else norm
    source = torch.randn(2, 9, 3, 128).to(dtype).requires_grad_()
    out = call(source[..., :64])
    direction = torch.randn(2, 9, 3, 64).to(dtype)
    got = out, *torch.autograd.grad(out, (source, norm.weight), direction)

    x, w = source.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = torch.nn.functional.rms_norm(x[..., :64], (64,), w, 1e-2)
    want = exact, *torch.autograd.grad(exact, (x, w), direction.double())
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() < bound * theirs.norm()
    assert [ours.dtype for ours in got] == [dtype, dtype, torch.float32]
