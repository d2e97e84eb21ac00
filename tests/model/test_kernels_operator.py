"""Attention as torch's operator: gradients without another forward pass, and one graph a block."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from ropepp.errors import InputError
from ropepp.model import ModelConfig, Transformer
from ropepp.model.documents import Documents
from ropepp.model.kernels import BACKENDS, Backend, attention, fused, operator
from ropepp.model.positions import ALiBi, FoPE, Position, RoPEppEC, RoPEppEH

T = 16
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, ffn_size=96, num_layers=2, num_heads=4, num_kv_heads=2
)
EARLIER = (torch.tensor([0, 3, 3, 10]), torch.tensor([0, 7, 9, 18]))
CASES: dict[str, dict[str, Any]] = {
    "rows": {"S": 5},
    "all keys": {"S": 7, "causal": False},
    "earlier keys": {"S": 9},
    "packed": {"S": 5, "cu_seqlens": torch.tensor([0, 1, 4, 5, 7, 10])},
    "packed with earlier keys": {"S": 9, "cu_seqlens": EARLIER[0], "cu_seqlens_k": EARLIER[1]},
    "hidden": {"S": 5, "document_ids": (torch.tensor([[0, 1, 0, 1, 1]] * 2),) * 2},
}


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_outputs_differences(
    case: str, heads: tuple[int, int], alibi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK", 4)
    options = dict(CASES[case])
    S = options.pop("S")
    H, K = heads
    inputs = [
        torch.randn(2, n, h, 4, dtype=torch.float64, requires_grad=True)
        for n, h in ((5, H), (S, K), (S, K))
    ]
    slopes = torch.rand(H) if alibi else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, alibi_slopes=slopes, backend="sdpa", **options), inputs
    )


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.extra), True])
def test_torchs_own_checks_of_the_operator(alibi: bool, packed: bool) -> None:
    q, k, v = (torch.randn(2, 5, h, 8, requires_grad=True) for h in (4, 2, 2))
    own = Documents(torch.tensor([0, 2, 5, 10]))
    bounds = [own.boundaries, own.host.clone()] if packed else []
    slopes = torch.rand(4) if alibi else None
    arguments = (q, k, v, bounds, slopes, [], True, 0.3, True, "sdpa")
    torch.library.opcheck(operator._attention, arguments)
    with torch.no_grad():
        out, log_sum = operator._attention(*arguments)
    saved = (out, out, log_sum, *(x.detach() for x in (q, k, v)))
    torch.library.opcheck(operator._backward, (*saved, bounds, slopes, [], True, 0.3, "sdpa"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes of the backend that "auto" chooses here, in their order."""
    seen: list[str] = []
    sdpa = BACKENDS["sdpa"]
    assert sdpa.backward is not None

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return run

    backward = logged("backward", sdpa.backward)
    counted = replace(sdpa, forward=logged("forward", sdpa.forward), backward=backward)
    monkeypatch.setitem(BACKENDS, "sdpa", counted)
    return seen


def packings(n: int) -> Iterator[Documents | None]:
    """Rows of no document, and n packings of different numbers and lengths of documents."""
    generator = torch.Generator().manual_seed(3)
    for documents in range(1, n + 1):
        cuts = torch.randperm(2 * T - 1, generator=generator)[: 2 * documents] + 1
        bounds = torch.cat((cuts, torch.tensor([0, T, 2 * T]))).unique()
        yield Documents(bounds)


def step(model: Transformer, documents: Documents | None) -> list[Tensor]:
    """Loss and gradients."""
    generator = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(64, (2, 2, T), generator=generator).unbind()
    model.zero_grad()
    loss, _ = model.loss(tokens, targets, document_ids=documents)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compiled(position: Position, **options: Any) -> Transformer:
    """As training compiles it, with empty counters of what that takes."""
    torch._dynamo.reset()
    counters.clear()
    model = Transformer(CONFIG, position, **options)
    for block in model.blocks():
        block.compile(dynamic=False)
    return model


def near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "dtype"),
    [
        pytest.param(RoPEppEC(), None, id="EC"),
        *(
            pytest.param(position, dtype, id=type(position).__name__, marks=pytest.mark.extra)
            for position, dtype in (
                (RoPEppEH(), torch.bfloat16),
                (FoPE(), None),
                (ALiBi(), torch.bfloat16),
            )
        ),
    ],
)
def test_one_graph_a_block_for_all_packings(
    position: Position, dtype: torch.dtype | None, calls: list[str]
) -> None:
    model, eager = (
        compiled(position, compute_dtype=dtype),
        Transformer(CONFIG, position, compute_dtype=dtype),
    )
    tolerance = 1e-5 if dtype is None else 0.03
    for documents in packings(6):
        near(step(model, documents), step(eager, documents), tolerance)
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1  # that of all blocks
    calls.clear()
    again = [step(model, next(iter(packings(1)))) for _ in range(2)]
    assert calls == ["forward", "forward", "backward", "backward"] * 2
    for x, y in zip(*again, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_rows_and_evaluation_are_one_graph_each() -> None:
    model = compiled(RoPEppEC())
    eager = Transformer(CONFIG, RoPEppEC())
    near(step(model, None), step(eager, None), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    tokens, targets = torch.randint(64, (2, 2, T)).unbind()
    for documents in (None, *packings(4)):
        with torch.no_grad():
            got, want = (
                m.evaluate(tokens, targets, document_ids=documents)[0] for m in (model, eager)
            )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3
    assert dict(counters["graph_break"]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("compiling", [False, True])
def test_recomputed_blocks_run_the_forward_pass_twice(compiling: bool, calls: list[str]) -> None:
    model = compiled(RoPEppEH()) if compiling else Transformer(CONFIG, RoPEppEH())
    documents = next(iter(packings(1)))
    want = step(Transformer(CONFIG, RoPEppEH()), documents)
    model.set_recompute(1)
    calls.clear()
    near(step(model, documents), want, 1e-5)
    assert calls == ["forward"] * 2 + ["forward", "backward"] * 2


def test_checkpoints_around_attention_alone(calls: list[str]) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    out = checkpoint(attention, q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert calls == ["forward", "forward", "backward"]


def test_no_operator_where_no_backward_pass_may_follow(calls: list[str]) -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    for _ in range(2):
        assert not attention(q, k, v).requires_grad
        q.requires_grad_()
        with torch.inference_mode():
            attention(q, k, v)
        q = q.detach()
    assert calls == ["forward"] * 4


@pytest.mark.slow
def test_a_backend_without_a_backward_pass_splits_the_block() -> None:
    """And its gradients are those of torch's autograd."""
    reference = BACKENDS["reference"]
    own = Backend("own", lambda request: None, reference.forward)
    eager = Transformer(CONFIG, RoPEppEC())
    documents = next(iter(packings(1)))
    want = step(eager, documents)
    for backend in ("reference", own):
        model = compiled(RoPEppEC())
        model.set_backend(backend)
        near(step(model, documents), want, 1e-5)
        assert counters["stats"]["unique_graphs"] > 1


def test_bad_requests_are_refused_in_words() -> None:
    q, k, v = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16)
    with pytest.raises(InputError, match="allowed: auto, reference, sdpa"):
        attention(q, k, v, backend="quantum")
    with pytest.raises(InputError, match=r"q \(1, 4, 4, 16\), k \(1, 4, 3, 16\)"):
        attention(q, torch.randn(1, 4, 3, 16), torch.randn(1, 4, 3, 16))
    with pytest.raises(InputError, match="as many keys as queries"):
        attention(q[:, :2], k, v, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(InputError, match=r"document_ids are .*\(1, 3\)\); they must be"):
        attention(q, k, v, document_ids=(torch.zeros(1, 4), torch.zeros(1, 3)))
    bounds, wrong = torch.tensor([0, 1, 4]), torch.tensor([0, 3])
    with pytest.raises(InputError, match="bound the same documents"):
        attention(q, k, v, cu_seqlens=bounds, cu_seqlens_k=wrong)
    with pytest.raises(InputError, match="cu_seqlens missing"):
        attention(q, k, v, cu_seqlens_k=wrong)
    with pytest.raises(InputError, match=r"cu_seqlens ends at 3; it must end .* 4"):
        attention(q, k, v, cu_seqlens=wrong)
    with pytest.raises(InputError, match=r"are \[1, 4\]; they must begin at 0"):
        attention(q, k, v, cu_seqlens=torch.tensor([1, 4]))
    with pytest.raises(InputError, match="document 1 has 3 queries and 2 keys"):
        attention(q, k, v, cu_seqlens=bounds, cu_seqlens_k=torch.tensor([0, 2, 4]))
