"""Every backend against the definition."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.kernels import BACKENDS, attention

FAST = [name for name in BACKENDS if name != "reference"]


def qkv(B: int, T: int, S: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, H, 16), (B, S, K, 16), (B, S, K, 16)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_the_definition_is_torchs() -> None:
    q, k, v = qkv(2, 9, 9, 4, 2)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    got = attention(q, k, v, backend="reference")
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1), (6, 3)])
@pytest.mark.parametrize(
    ("T", "S", "causal", "lengths"),
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
    lengths: list[int] | None,
) -> None:
    inputs = qkv(2, T, S, *heads)
    slopes = torch.rand(heads[0]) if alibi else None
    bounds = None
    if lengths is not None:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    results = []
    for name in ("reference", backend):
        out = attention(
            *inputs, causal=causal, cu_seqlens=bounds, alibi_slopes=slopes, scale=0.3, backend=name
        )
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        results.append((out, *gradients))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("T", [1, 4, 9])
def test_hidden_keys(backend: str, alibi: bool, T: int) -> None:
    q, k, v = qkv(2, T, 9, 4, 2)
    visible = torch.rand(2, T, 9) < 0.5
    visible[:, :, 0] = True
    slopes = torch.rand(4) if alibi else None
    want, got = (
        attention(q, k, v, visible=visible, alibi_slopes=slopes, backend=name)
        for name in ("reference", backend)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    moved = k.detach().clone()
    moved[:, 3] += 100.0
    only = visible.clone()
    only[:, :, 3] = False
    near, far = (attention(q, x, v, visible=only, backend=backend) for x in (k, moved))
    assert torch.equal(near, far)


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


def test_bad_requests_are_refused_in_words() -> None:
    q, k, v = qkv(1, 4, 4, 4, 2)
    with pytest.raises(InputError, match="allowed: auto, reference, sdpa"):
        attention(q, k, v, backend="quantum")
    with pytest.raises(InputError, match=r"q \(1, 4, 4, 16\), k \(1, 4, 3, 16\)"):
        attention(q, torch.randn(1, 4, 3, 16), torch.randn(1, 4, 3, 16))
    with pytest.raises(InputError, match="as many keys as queries"):
        attention(q[:, :2], k, v, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(InputError, match=r"visible is \(1, 4, 3\); it must be \(1, 4, 4\)"):
        attention(q, k, v, visible=torch.ones(1, 4, 3, dtype=torch.bool))
