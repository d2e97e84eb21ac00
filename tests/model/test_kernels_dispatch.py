"""Which backend serves what, and what the GPU's kernels are called with; on a CPU, with tensors
that only say that they are on a GPU and packages that only look like the real ones."""

import logging
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ropepp.errors import InputError
from ropepp.model.documents import Documents
from ropepp.model.kernels import BACKENDS, Request, attention, choose, flash, flex, registry
from ropepp.model.kernels import backend as refusals

HOPPER = (9, 0)
HALF = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A machine with a GPU and some packages, as far as the reasons to refuse look at it."""

    def have(capability: tuple[int, int] = HOPPER, *packages: str, triton: bool = True) -> None:
        def load(module: str, package: str, extra: str, function: str) -> Any:
            return SimpleNamespace() if package in packages else f"{package} is missing"

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(flash, "load", load)
        monkeypatch.setattr(flex, "has_triton", lambda: triton)

    have()
    with FakeTensorMode():
        yield have


def request(
    dtype: torch.dtype = HALF,
    *,
    D: int = 64,
    T: int = 8,
    S: int | None = None,
    packed: bool = False,
    alibi: bool = False,
    hidden: bool = False,
    device: str = "cuda",
    causal: bool = True,
    grad: bool = False,
) -> Request:
    S = S or T
    q = torch.empty(2, T, 4, D, dtype=dtype, device=device, requires_grad=grad)
    k = torch.empty(2, S, 2, D, dtype=dtype, device=device)
    host, own = (torch.empty(4, dtype=torch.int32, device=where) for where in ("cpu", device))
    bounds = Documents(host, own) if packed else None
    slopes = torch.empty(4, device=device) if alibi else None
    ids = tuple(torch.empty(2, n, dtype=torch.int64, device=device) for n in (T, S))
    return Request(q, k, k, causal, bounds, bounds, slopes, ids if hidden else None, 1.0)


@pytest.mark.parametrize(
    ("wanted", "asked", "packages"),
    [
        ("sdpa", {}, []),
        ("sdpa", {"T": 1, "S": 9}, []),
        ("sdpa", {"S": 9}, ["flash-attn", "flash-attn-4"]),
        ("varlen", {"packed": True}, ["flash-attn", "flash-attn-4"]),
        ("varlen", {"packed": True, "dtype": torch.float16}, []),
        ("sdpa", {"packed": True, "dtype": torch.float32}, []),
        ("sdpa", {"packed": True, "D": 264}, []),
        ("flash2", {"alibi": True}, ["flash-attn"]),
        ("flash2", {"alibi": True, "packed": True}, ["flash-attn"]),
        ("flash2", {"alibi": True, "T": 1, "S": 9}, ["flash-attn"]),
        ("flex", {"alibi": True}, ["flash-attn-4"]),
        ("flex", {"alibi": True, "packed": True}, []),
        ("sdpa", {"alibi": True, "T": 1, "S": 9}, []),
        ("sdpa", {"alibi": True, "hidden": True}, ["flash-attn"]),
        ("sdpa", {"alibi": True, "dtype": torch.float32}, ["flash-attn"]),
        ("sdpa", {"hidden": True}, []),
        ("sdpa", {"device": "cpu", "packed": True}, []),
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
    assert choose(request(torch.float16, packed=True)) == "sdpa"
    gpu(HOPPER, triton=False)
    assert choose(request(alibi=True)) == "sdpa"


def test_a_choice_is_logged_once(
    gpu: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    registry._announce.cache_clear()
    caplog.set_level(logging.INFO, "ropepp.model.kernels")
    for _ in range(3):
        choose(request(packed=True))
        choose(request(D=128, packed=True))
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
        ("flex", HOPPER, [], {"alibi": True, "packed": True, "grad": True}, None),
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


def like_flash2(calls: list[str]) -> SimpleNamespace:
    """flash-attn 2.8's functions, as far as their parameters go."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append("dense")
        options = {"causal": causal, "scale": softmax_scale, "alibi_slopes": alibi_slopes}
        return attention(q, k, v, backend="reference", **options)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append(f"varlen {max_seqlen_q} {max_seqlen_k}")
        options = {"causal": causal, "scale": softmax_scale, "alibi_slopes": alibi_slopes}
        return by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )


def like_flash4(calls: list[str]) -> SimpleNamespace:
    """flash-attn-4's functions, which return the log-sum-exp too."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append("dense")
        options = {"causal": causal, "scale": softmax_scale}
        return attention(q, k, v, backend="reference", **options), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, softmax_scale=None, causal=False,
        deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        calls.append(f"varlen {max_seqlen_q} {max_seqlen_k}")
        options = {"causal": causal, "scale": softmax_scale}
        return by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, **options), None

    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )


def like_varlen(calls: list[str]) -> Callable[..., Tensor]:
    """`torch.nn.attention.varlen.varlen_attn`."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert enable_gqa
        calls.append(f"varlen {max_q} {max_k}")
        options = {"causal": window_size == (-1, 0), "scale": scale}
        return by_document(query, key, value, cu_seq_q, cu_seq_k, **options)

    return varlen_attn


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
    calls: list[str] = []
    packages = {"flash-attn": like_flash2(calls), "flash-attn-4": like_flash4(calls)}
    monkeypatch.setattr(flash, "load", lambda module, package, *rest: packages[package])
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", like_varlen(calls))
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, S, 2, 8), torch.randn(2, S, 2, 8)
    bounds = bounds_k = None
    if sizes is not None:
        bounds = bounds_k = Documents(torch.tensor([0, *sizes[0]]).cumsum(0))
        if sizes[1] is not None:
            bounds_k = Documents(torch.tensor([0, *sizes[1]]).cumsum(0))
    slopes = torch.rand(4) if name == "flash2" else None
    asked = Request(q, k, v, causal, bounds, bounds_k, slopes, None, 0.3)
    want = BACKENDS["reference"].run(asked)
    torch.testing.assert_close(BACKENDS[name].run(asked), want, atol=1e-6, rtol=0)
    assert calls == [f"varlen {called}" if sizes or name == "varlen" else "dense"]
