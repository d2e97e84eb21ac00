"""Which backend serves what, and what the GPU's kernels are called with; on a CPU, with tensors
that only say that they are on a GPU and packages that only look like the real ones."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ropepp.errors import InputError
from ropepp.model.documents import Documents
from ropepp.model.kernels import BACKENDS, Request, attention, choose, flash, flex, fused, registry
from ropepp.model.kernels import backend as refusals

HOPPER = (9, 0)
HALF = torch.bfloat16
UNEVEN = (5, 8, 3)  # documents in two rows of 8 tokens


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A machine with a GPU and some packages, as far as the reasons to refuse look at it."""

    def have(capability: tuple[int, int] = HOPPER, *packages: str, triton: bool = True) -> None:
        def load(module: str, package: str, extra: str, function: str) -> Any:
            return SimpleNamespace() if package in packages else f"{package} is missing"

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(flash, "load", load)
        monkeypatch.setattr(flex, "has_triton", lambda: triton)
        monkeypatch.setattr(fused, "SDPAParams", lambda q, *rest: q.shape[-1])
        monkeypatch.setattr(fused, "can_use_cudnn_attention", lambda size: size <= 128)

    have()
    with FakeTensorMode():
        yield have


def request(
    dtype: torch.dtype = HALF,
    *,
    D: int = 64,
    T: int = 8,
    S: int | None = None,
    packed: tuple[int, ...] = (),
    alibi: bool = False,
    hidden: bool = False,
    device: str = "cuda",
    causal: bool = True,
    grad: bool = False,
) -> Request:
    S = S or T
    q = torch.empty(2, T, 4, D, dtype=dtype, device=device)
    k = torch.empty(2, S, 2, D, dtype=dtype, device=device)
    bounds: Any = SimpleNamespace(lengths=packed) if packed else None
    slopes = torch.empty(4, device=device) if alibi else None
    ids = tuple(torch.empty(2, n, dtype=torch.int64, device=device) for n in (T, S))
    return Request(q, k, k, causal, bounds, bounds, slopes, ids if hidden else None, 1.0, grad)


@pytest.mark.parametrize(
    ("wanted", "asked", "packages"),
    [
        ("varlen", {}, ["flash-attn", "flash-attn-4"]),
        ("varlen", {"S": 9, "grad": True}, ["flash-attn", "flash-attn-4"]),
        ("cudnn", {"grad": True}, ["flash-attn-4"]),
        ("varlen", {"grad": True, "D": 256}, []),
        ("sdpa", {"T": 1, "S": 9}, []),
        ("varlen", {"S": 9}, ["flash-attn", "flash-attn-4"]),
        ("flash4", {"packed": UNEVEN}, ["flash-attn", "flash-attn-4"]),
        ("varlen", {"packed": UNEVEN}, ["flash-attn"]),
        ("varlen", {"packed": UNEVEN, "dtype": torch.float16, "grad": True}, []),
        ("flash4", {"packed": UNEVEN, "grad": True}, ["flash-attn-4"]),
        ("cudnn", {"packed": (8, 8), "grad": True}, ["flash-attn-4"]),
        ("flash4", {"packed": (8, 8)}, ["flash-attn-4"]),
        ("flash4", {"packed": (4, 4, 4, 4), "grad": True}, ["flash-attn-4"]),
        ("sdpa", {"packed": UNEVEN, "dtype": torch.float32}, []),
        ("sdpa", {"packed": UNEVEN, "D": 264}, []),
        ("flash2", {"alibi": True}, ["flash-attn"]),
        ("flash2", {"alibi": True, "packed": UNEVEN}, ["flash-attn"]),
        ("flash2", {"alibi": True, "T": 1, "S": 9}, ["flash-attn"]),
        ("flex", {"alibi": True}, ["flash-attn-4"]),
        ("flex", {"alibi": True, "packed": UNEVEN}, []),
        ("sdpa", {"alibi": True, "T": 1, "S": 9}, []),
        ("sdpa", {"alibi": True, "hidden": True}, ["flash-attn"]),
        ("sdpa", {"alibi": True, "dtype": torch.float32}, ["flash-attn"]),
        ("sdpa", {"hidden": True}, []),
        ("sdpa", {"device": "cpu", "packed": UNEVEN}, []),
        ("sdpa", {"device": "cpu", "alibi": True}, []),
    ],
)
def test_auto(
    gpu: Callable[..., None], wanted: str, asked: dict[str, Any], packages: list[str]
) -> None:
    gpu(HOPPER, *packages)
    assert choose(request(**asked)) == wanted


def test_auto_on_an_old_gpu_or_without_a_compiler(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    assert choose(request(torch.float16, packed=UNEVEN)) == "sdpa"
    gpu(HOPPER, triton=False)
    assert choose(request(alibi=True)) == "sdpa"


def test_a_choice_is_logged_once(
    gpu: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    registry._announce.cache_clear()
    caplog.set_level(logging.INFO, "ropepp.model.kernels")
    for _ in range(3):
        choose(request(packed=UNEVEN))
        choose(request(D=128, packed=UNEVEN))
    choose(request(alibi=True))
    assert caplog.messages == [
        "attention of packed documents in bfloat16 on cuda: varlen",
        "attention of rows with ALiBi slopes in bfloat16 on cuda: flex",
    ]


@pytest.mark.parametrize(
    ("name", "capability", "packages", "asked", "reason"),
    [
        ("cudnn", HOPPER, [], {"device": "cpu"}, "needs CUDA tensors, and these are on cpu"),
        ("cudnn", HOPPER, [], {"dtype": torch.float32}, "needs bfloat16 or float16, .* float32"),
        ("cudnn", HOPPER, [], {"S": 9}, "aligned for as many queries as keys"),
        ("cudnn", HOPPER, [], {"D": 256}, "no kernel for these shapes"),
        ("cudnn", HOPPER, [], {"alibi": True}, "no ALiBi slopes"),
        ("varlen", HOPPER, [], {"device": "cpu"}, "needs CUDA tensors"),
        ("varlen", HOPPER, [], {"alibi": True}, "no ALiBi slopes"),
        ("varlen", HOPPER, [], {"hidden": True}, "no document ids of single keys"),
        ("varlen", HOPPER, [], {"D": 20}, "multiples of 8 up to 256, and this is 20"),
        ("varlen", (7, 5), [], {}, r"8\.0 \(Ampere\) or newer, and this has 7\.5"),
        ("flash2", HOPPER, [], {}, "flash-attn is missing"),
        ("flash2", HOPPER, ["flash-attn"], {"D": 264}, "up to 256, and this is 264"),
        ("flash2", HOPPER, ["flash-attn"], {"alibi": True}, None),
        ("flash4", HOPPER, ["flash-attn"], {}, "flash-attn-4 is missing"),
        ("flash4", (8, 0), ["flash-attn-4"], {}, r"9\.0 \(Hopper\) or newer, and this has 8\.0"),
        ("flash4", HOPPER, ["flash-attn-4"], {"D": 192}, None),
        ("flash4", (10, 0), ["flash-attn-4"], {"D": 192}, "up to 128, or 256"),
        ("flash4", (10, 0), ["flash-attn-4"], {"alibi": True}, "no ALiBi slopes"),
        ("flex", HOPPER, [], {"alibi": True, "packed": UNEVEN, "grad": True}, None),
        ("flex", HOPPER, [], {"D": 8}, "at least 16, and this is 8"),
        ("flex", HOPPER, [], {"hidden": True}, "no document ids of single keys"),
        ("flex", HOPPER, [], {"device": "cpu", "grad": True}, "on the CPU it has no gradient"),
        ("flex", HOPPER, [], {"device": "cpu"}, None),
        ("flex", HOPPER, [], {"device": "meta"}, "CUDA or the CPU, and these are on meta"),
    ],
)
def test_reasons(
    gpu: Callable[..., None],
    name: str,
    capability: tuple[int, int],
    packages: list[str],
    asked: dict[str, Any],
    reason: str | None,
) -> None:
    gpu(capability, *packages)
    found = BACKENDS[name].refuse(request(**asked))
    assert (found is None) == (reason is None)
    assert reason is None or re.search(reason, found or ""), found


def test_a_backward_pass_that_is_not_deterministic(gpu: Callable[..., None]) -> None:
    gpu((12, 0), "flash-attn-4")
    torch.use_deterministic_algorithms(True)
    try:
        assert BACKENDS["flash4"].refuse(request()) is None
        reason = BACKENDS["flash4"].refuse(request(grad=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert reason == "its backward pass is not deterministic on this GPU"


def test_the_error_names_reason_and_alternatives() -> None:
    q, k = torch.randn(1, 4, 4, 16, requires_grad=True), torch.randn(1, 4, 2, 16)
    with pytest.raises(InputError) as caught:
        attention(q, k, k, backend="varlen")
    assert str(caught.value) == (
        "attention backend 'varlen' cannot serve rows in float32 on cpu: it needs CUDA tensors, "
        "and these are on cpu; these can: auto, reference, sdpa"
    )
    with pytest.raises(InputError, match=r"no gradient; these can: auto, reference, sdpa$"):
        attention(q, k, k, backend="flex")
    with pytest.raises(InputError, match=r"these can: auto, reference, sdpa, flex$"):
        attention(q.detach(), k, k, alibi_slopes=torch.rand(4), backend="flash2")


def test_packages_that_are_missing_broken_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals.load.cache_clear()
    missing = "the package flash-attn is missing: pip install 'ropepp[flash]'"
    arguments = ("no_such_module", "flash-attn", "flash", "flash_attn_varlen_func")
    assert refusals.load(*arguments) == missing
    # flash-attn-4 alone makes `flash_attn` importable, without functions.
    assert refusals.load("math", *arguments[1:]) == missing

    def fail(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c104\nand more")

    monkeypatch.setattr(refusals.importlib, "import_module", fail)
    assert refusals.load("other", *arguments[1:]) == (
        "the package flash-attn is installed but fails: undefined symbol: _ZN3c104"
    )


def by_document(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, **options: Any) -> Tensor:
    """What a varlen kernel computes, document by document."""
    starts, starts_k = (pairwise(bound.tolist()) for bound in bounds)
    parts = [
        attention(q[None, a:b], k[None, c:d], v[None, c:d], backend="reference", **options)[0]
        for (a, b), (c, d) in zip(starts, starts_k, strict=True)
        if b > a
    ]
    return torch.cat(parts)


class Kernels:
    """A forward and a backward pass over documents, as the parameters of real ones are: the second
    takes what the first returned."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.log_sum = torch.empty(0)

    def forward(self, q, k, v, bounds, bounds_k, most, most_k, causal, scale, slopes=None):  # type: ignore[no-untyped-def]  # fmt: skip
        self.calls.append(f"{most} {most_k}")
        options = {"causal": causal, "scale": scale, "alibi_slopes": slopes}
        out = by_document(q, k, v, bounds, bounds_k, **options)
        self.log_sum = torch.rand(q.shape[1], len(q))
        return out, self.log_sum

    def backward(self, grad, q, k, v, out, log_sum, bounds, bounds_k, most, most_k, causal, scale, slopes=None):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
        self.calls.append(f"back {most} {most_k}")
        options = {"causal": causal, "scale": scale, "alibi_slopes": slopes}
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = by_document(*inputs, bounds, bounds_k, **options)
        torch.testing.assert_close(out, again)
        assert torch.equal(log_sum, self.log_sum)
        return torch.autograd.grad(again, inputs, grad)


def like_flash2(kernels: Kernels) -> SimpleNamespace:
    """flash-attn 2.8's functions, as far as their parameters go."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert dropout_p == 0
        documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = kernels.forward(q, k, v, *documents, causal, softmax_scale, alibi_slopes)
        return *found, torch.empty(0), torch.empty(2)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        saved = dout, q, k, v, out, softmax_lse
        found = kernels.backward(*saved, *documents, causal, softmax_scale, alibi_slopes)
        for own, x in zip((dq, dk, dv), found, strict=True):
            own.copy_(x)
        return torch.empty(0)

    return SimpleNamespace(
        _wrapped_flash_attn_varlen_forward=forward, _wrapped_flash_attn_varlen_backward=backward
    )


def like_flash4(kernels: Kernels) -> SimpleNamespace:
    """flash-attn-4's functions, as far as they are used."""

    def forward(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, return_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert return_lse
        documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *kernels.forward(q, k, v, *documents, causal, softmax_scale), None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        documents = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return kernels.backward(dout, q, k, v, out, lse, *documents, causal, softmax_scale)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


def like_torch(kernels: Kernels) -> SimpleNamespace:
    """torch's operators."""

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        documents = cum_seq_q, cum_seq_k, max_q, max_k
        found = kernels.forward(query, key, value, *documents, is_causal, scale)
        return *found, torch.empty(2), torch.empty(0), torch.empty(0)

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
        is_causal, rng_state, unused, *, scale=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        documents = cum_seq_q, cum_seq_k, max_q, max_k
        saved = grad_out, query, key, value, out, logsumexp
        return kernels.backward(*saved, *documents, is_causal, scale)

    return SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)


@pytest.mark.parametrize("name", ["varlen", "flash2", "flash4"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "sizes", "called"),
    [
        (6, 9, None, "6 9"),
        (6, 6, ([2, 4, 5, 1], None), "5 5"),
        (6, 9, ([2, 0, 4, 0, 6], [3, 2, 4, 0, 9]), "6 9"),
    ],
)
def test_what_kernels_of_documents_are_called_with(
    name: str,
    causal: bool,
    T: int,
    S: int,
    sizes: Any,
    called: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = Kernels()
    packages = {"flash-attn": like_flash2(kernels), "flash-attn-4": like_flash4(kernels)}
    monkeypatch.setattr(flash, "load", lambda module, package, *rest: packages[package])
    monkeypatch.setattr(flash, "aten", like_torch(kernels))
    inputs = [torch.randn(2, n, heads, 8) for n, heads in ((T, 4), (S, 2), (S, 2))]
    own = own_k = None
    if sizes is not None:
        own = own_k = Documents(torch.tensor([0, *sizes[0]]).cumsum(0))
        if sizes[1] is not None:
            own_k = Documents(torch.tensor([0, *sizes[1]]).cumsum(0))
    slopes = torch.rand(4) if name == "flash2" else None
    asked = Request(*inputs, causal, own, own_k, slopes, None, 0.3, needs_grad=True)
    backend = BACKENDS[name]
    out, log_sum = backend.forward(asked)
    assert backend.backward is not None
    assert log_sum is not None
    grad = torch.randn_like(out)
    got = (out, *backend.backward(asked, grad, out, log_sum))
    given = replace(asked, **dict(zip("qkv", (x.requires_grad_() for x in inputs), strict=True)))
    want, _ = BACKENDS["reference"].forward(given)
    for x, y in zip(got, (want, *torch.autograd.grad(want, inputs, grad)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    assert kernels.calls == [called, f"back {called}"]


def test_torchs_kernels_take_what_they_are_given() -> None:
    """Names and number of the arguments are those of the operators of this version of torch."""
    q = torch.empty(2, 16, 4, 64, dtype=HALF, device="meta")
    k = torch.empty(2, 16, 2, 64, dtype=HALF, device="meta")
    host = torch.tensor([0, 8, 20, 32])
    own = Documents(host, host.to("meta"))
    for name in ("varlen", "cudnn"):
        given = None if name == "cudnn" else own
        asked = Request(q, k, k, True, given, given, None, None, 0.1, needs_grad=True)
        backend = BACKENDS[name]
        assert backend.backward is not None
        out, log_sum = backend.forward(asked)
        assert log_sum is not None
        assert out.shape == q.shape
        assert log_sum.shape == (2 * 16 * 4,)
        found = backend.backward(asked, out, out, log_sum)
        assert [x.shape for x in found] == [q.shape, k.shape, k.shape]
