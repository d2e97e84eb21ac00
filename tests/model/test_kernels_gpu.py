"""Every backend that serves a request on this GPU against the definition, in bfloat16.

Tolerance: 3% of the largest element of an output or gradient. bfloat16 has 8 significant bits, so
that rounding an element alone is 0.4%, and the weights of the softmax are rounded before they mix.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ropepp.model.documents import Documents
from ropepp.model.kernels import BACKENDS, Request, attention

pytestmark = pytest.mark.gpu

TOLERANCE = 0.03
NAMES = ["auto", *(name for name in BACKENDS if name != "reference")]
UNEVEN = [1, 130, 0, 200, 53, 384]
# name: queries a row, keys a row, lengths of documents, of their keys, causal
CASES: dict[str, tuple[int, int, list[int] | None, list[int] | None, bool]] = {
    "rows": (384, 384, None, None, True),
    "rows that see everything": (384, 384, None, None, False),
    "rows of odd length": (257, 257, None, None, True),
    "documents": (384, 384, UNEVEN, None, True),
    "equal documents": (384, 384, [128] * 6, None, True),
    "documents that see everything": (384, 384, UNEVEN, None, False),
    "documents with earlier keys": (192, 384, [0, 130, 0, 200, 54], [64, 131, 0, 500, 73], True),
    "cached rows": (100, 384, None, None, True),
    "one query a row": (1, 384, None, None, True),
}


def request(
    case: str, heads: tuple[int, int, int], alibi: bool, hidden: bool = False
) -> dict[str, Any]:
    """Arguments of `attention`, on the GPU, in bfloat16."""
    T, S, sizes, sizes_k, causal = CASES[case]
    H, K, D = heads
    shapes = (2, T, H, D), (2, S, K, D), (2, S, K, D)
    arguments: dict[str, Any] = {
        name: torch.randn(shape, device="cuda").bfloat16().requires_grad_()
        for name, shape in zip("qkv", shapes, strict=True)
    }
    for name, own in (("cu_seqlens", sizes), ("cu_seqlens_k", sizes_k)):
        if own is not None:
            bounds = torch.tensor([0, *own]).cumsum(0).to(torch.int32)
            arguments[name] = bounds.cuda()
    if alibi:
        arguments["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, H, device="cuda")
    if hidden:
        ids = torch.randint(2, (2, S), device="cuda")
        arguments["document_ids"] = (ids[:, S - T :], ids)
    return {**arguments, "causal": causal}


def skip_if_refused(name: str, arguments: dict[str, Any]) -> None:
    if name == "auto":
        return
    fields = {**dict.fromkeys(Request.__dataclass_fields__), "scale": 1.0, **arguments}
    own, own_k = fields.pop("cu_seqlens", None), fields.pop("cu_seqlens_k", None)
    fields["documents"] = fields["documents_k"] = None if own is None else Documents.of(own)
    if own_k is not None:
        fields["documents_k"] = Documents.of(own_k)
    reason = BACKENDS[name].refuse(Request(**fields))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def results(name: str, arguments: dict[str, Any], grad_out: Tensor) -> list[Tensor]:
    """Output and gradients; the definition's in float32 all the way."""
    inputs = [arguments[x] for x in "qkv"]
    if name == "reference":
        inputs = [x.detach().float().requires_grad_() for x in inputs]
    given = {**arguments, **dict(zip("qkv", inputs, strict=True))}
    out = attention(**given, backend=name)
    return [out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).abs().max() / want.abs().max().clamp(min=1e-6)
    assert error < TOLERANCE, f"off by {error:.2%} of the largest element"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 4, 64)], ids=["grouped", "plain"])
def test_outputs_and_gradients(
    name: str, case: str, alibi: bool, heads: tuple[int, int, int]
) -> None:
    arguments = request(case, heads, alibi)
    skip_if_refused(name, arguments)
    grad_out = torch.randn_like(arguments["q"])
    want = results("reference", arguments, grad_out)
    got = results(name, arguments, grad_out)
    for x, y in zip(got, want, strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("case", ["rows", "cached rows", "one query a row"])
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
def test_hidden_keys(case: str, alibi: bool) -> None:
    arguments = request(case, (8, 2, 128), alibi, hidden=True)
    grad_out = torch.randn_like(arguments["q"])
    for x, y in zip(
        results("auto", arguments, grad_out), results("reference", arguments, grad_out), strict=True
    ):
        assert_near(x, y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["rows", "documents"])
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
def test_gradients_after_an_evaluation(name: str, case: str, alibi: bool) -> None:
    """What is kept from a call in inference mode must not reach a backward pass."""
    arguments = request(case, (8, 2, 128), alibi)
    skip_if_refused(name, arguments)
    with torch.inference_mode():
        before = attention(**arguments, backend=name)
    out, *_ = results(name, arguments, torch.ones_like(before))
    assert_near(out, before.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["rows", "documents"])
def test_deterministic_mode(name: str, case: str) -> None:
    """The same bits twice, which exact resume needs."""
    arguments = request(case, (8, 2, 128), alibi=False)
    torch.use_deterministic_algorithms(True)
    try:
        skip_if_refused(name, arguments)
        grad_out = torch.randn_like(arguments["q"])
        runs = [results(name, arguments, grad_out) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
