"""Stages of gpu_check: versions and ceilings; every attention backend against the definition, and
its speed; the loss by rows of a chunk.
"""

import importlib.util
import sys
import time
from collections.abc import Container, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

import gpu_loss
from gpu_device import DTYPE, TOLERANCE, Bench, Case, Figure, distance
from measure import SPECS
from ropepp.errors import InputError
from ropepp.model import ModelConfig
from ropepp.model.kernels import BACKENDS, Backend, attention

PACKAGES = (
    *("lightning", "numpy", "triton", "nvidia-cudnn-cu13", "flash-attn", "flash-attn-4"),
    *("liger-kernel", "jsonargparse", "omegaconf"),
)
PLAIN = ("documents", "rows", "T < S", "documents, T < S", "one query")
KINDS = (*PLAIN, "documents, ALiBi", "rows, ALiBi")  # of requests


def ceilings(bench: Bench) -> list[Case]:
    """What the machine is, and the most that it can do."""
    return [
        Case("versions", partial(_versions, bench), "versions"),
        Case("product", partial(_product, bench)),
        Case("copy", partial(_copy, bench)),
    ]


def _versions(bench: Bench) -> Iterator[Figure]:
    yield "device", bench.device.name, ""
    yield "python", sys.version.split()[0], ""
    yield "torch", torch.__version__, ""
    if not bench.rehearses:
        free, total = torch.cuda.mem_get_info()
        yield "memory", total / 1e9, "GB"
        yield "free", free / 1e9, "GB"
        yield "capability", ".".join(map(str, torch.cuda.get_device_capability())), ""
        yield "cuDNN", str(torch.backends.cudnn.version()), ""
    for package in PACKAGES:
        try:
            yield package, version(package), ""
        except PackageNotFoundError:
            yield package, "missing", ""
    # FlashAttention 3 has no version of its own at the package index.
    found = importlib.util.find_spec("flash_attn_interface") is not None
    yield "flash_attn_interface", "there" if found else "missing", ""


def _product(bench: Bench) -> Iterator[Figure]:
    size = bench.scale.product
    yield f"{size} cubed", bench.device.measure_product(size) / 1e12, "TFLOP/s"
    peak = bench.device.peak_flops
    if peak:
        yield "data sheet", peak / 1e12, "TFLOP/s"


def _copy(bench: Bench) -> Iterator[Figure]:
    speed = bench.device.measure_bandwidth(bench.scale.copied)
    yield "read and written", speed / 1e12, "TB/s"


class Heads(NamedTuple):
    """Attention heads, kv heads, size of a head."""

    H: int
    K: int
    D: int


def heads_of(config: ModelConfig) -> dict[str, Heads]:
    """Of each variant."""
    layouts = {n: p.layout(config.num_heads, config.num_kv_heads) for n, p in SPECS.items()}
    return {n: Heads(x.num_heads, x.num_kv_heads, config.head_dim) for n, x in layouts.items()}


class Asked(NamedTuple):
    """What is asked of attention: sizes (B, T) and (B, S), boundaries, slopes."""

    B: int
    T: int
    S: int
    bounds: Tensor | None = None
    bounds_k: Tensor | None = None
    slopes: Tensor | None = None


def asked(device: torch.device, T: int, H: int) -> dict[str, Asked]:
    """Kinds of requests that training, prompts and decoding make."""
    sizes = [T // 3, 1, 0, T // 2, 3, 1, 0]
    sizes.append(2 * T - sum(sizes))
    sizes_q, sizes_k = [3, 1, 0, T // 4], [10, 1, 5, T]
    documents, bounds_q, bounds_k = (
        torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device)
        for x in (sizes, sizes_q, sizes_k)
    )
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], device=device)
    found = (
        Asked(2, T, T, documents),
        Asked(2, T, T),
        Asked(2, T // 4, T),
        Asked(1, sum(sizes_q), sum(sizes_k), bounds_q, bounds_k),
        Asked(2, 1, T),
        Asked(2, T, T, documents, slopes=slopes),
        Asked(2, T, T, slopes=slopes),
    )
    return dict(zip(KINDS, found, strict=True))


def attend(backend: str | Backend, q: Tensor, k: Tensor, v: Tensor, what: Asked) -> Tensor:
    """Attention by one backend, the way the model asks for it."""
    return attention(
        q, k, v, cu_seqlens=what.bounds, cu_seqlens_k=what.bounds_k,
        alibi_slopes=what.slopes, backend=backend,
    )  # fmt: skip


def refusal(error: InputError) -> str:
    """Why a backend does not serve a request, without which request and which backends do."""
    said = str(error).partition(": ")[2].rpartition("; these can")[0]
    return said or str(error)


def parity(bench: Bench) -> list[Case]:
    """Every backend that is there but flex, which has a stage of its own."""
    names = [name for name in BACKENDS if name not in ("reference", "flex")]
    first = ("varlen", "flash4", "cudnn")  # those that train
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    shapes = heads_of(bench.scale.models["376m"])
    attends = [
        Case(f"{name} {variant}", partial(compare, bench, name, heads), compiles=False)
        for variant, heads in shapes.items()
        for name in names
    ]
    kinds = (*gpu_loss.LOSSES, "liger")
    losses = [Case(n, partial(gpu_loss.compare_loss, bench, n), "loss") for n in kinds]
    return [attends[0], *losses, *attends[1:]]


def compare(
    bench: Bench, backend: str | Backend, heads: Heads, kinds: Container[str] = KINDS
) -> Iterator[Figure]:
    """Relative L2 of output and gradients to those of the definition in float32, the largest of
    them, for some kinds of requests; what differs between two calls."""
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    restless: dict[str, list[str]] = {}
    requests = asked(bench.device.device, bench.scale.parity, heads.H)
    for name, what in requests.items():
        if name not in kinds:
            continue
        inputs = draw(bench, heads, what)
        try:
            one = outcome(backend, inputs, what)
        except InputError as error:
            refused[name] = refusal(error)
            continue
        other, true = outcome(backend, inputs, what), outcome("reference", inputs, what, True)
        found[name] = max(distance(a, true[key]) for key, a in one.items())
        yield name + ("" if len(one) > 1 else " (no gradient)"), found[name], ""
        if differ := [key for key, a in one.items() if not torch.equal(a, other[key])]:
            restless[name] = differ
    if found:
        twice = "; ".join(f"{name}: {', '.join(x)}" for name, x in restless.items())
        yield "twice the same bits", f"no ({twice})" if twice else "yes", ""
    reasons = dict.fromkeys(refused.values())
    for reason in reasons:
        own = [name for name, other in refused.items() if other == reason]
        yield f"refuses {'all' if not found and len(reasons) == 1 else ', '.join(own)}", reason, ""
    wrong = {name: value for name, value in found.items() if not value < TOLERANCE}
    if wrong:
        raise AssertionError(f"relative L2 over {TOLERANCE}: {wrong}")


def draw(bench: Bench, heads: Heads, what: Asked) -> tuple[Tensor, ...]:
    """Queries, keys, values and the gradient of the output, bfloat16."""
    (B, T, S), (H, K, D), device = what[:3], heads, bench.device.device
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D))
    return tuple(torch.randn(shape, device=device).to(DTYPE) for shape in shapes)


def outcome(
    backend: str | Backend, inputs: tuple[Tensor, ...], what: Asked, wide: bool = False
) -> dict[str, Tensor]:
    """Output and, where the backend has them, gradients."""
    q, k, v, grad = (x.float() if wide else x for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    try:
        out = attend(backend, *leaves, what)
    except InputError as error:
        if "gradient" not in str(error):
            raise
        with torch.no_grad():
            return {"out": attend(backend, q, k, v, what)}
    grads = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def speed(bench: Bench) -> list[Case]:
    """RoPE's attention, then the loss, then the other variants' attention."""
    shapes = heads_of(bench.scale.models["376m"])
    attends = {name: list(_attends(bench, name, heads)) for name, heads in shapes.items()}
    first, *others = attends.values()
    return [*first, *gpu_loss.losses(bench), *(case for own in others for case in own)]


def _attends(bench: Bench, variant: str, heads: Heads) -> Iterator[Case]:
    ways = ["varlen", "flash4", "flash2", "cudnn"]
    for (rows, length), way in product(bench.scale.layouts, ways):
        name = f"{variant} {rows} x {length} {way}"
        run = partial(time_attention, bench, heads, rows, length, way)
        yield Case(name, run, "attention", compiles=False)


def time_attention(
    bench: Bench, heads: Heads, rows: int, length: int, way: str, slopes: bool = False
) -> Iterator[Figure]:
    """Of causal rows, as packed documents where a backend serves these; FLOPs are 4 D a pair and
    head forward, and 2.5 times these backward, as is customary for kernels."""
    device, bounds = bench.device, None
    if way in ("varlen", "flash2", "flash4", "flex"):
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=device.device) * length
    alibi = asked(device.device, length, heads.H)["rows, ALiBi"].slopes if slopes else None
    what = Asked(rows, length, length, bounds, slopes=alibi)
    q, k, v, grad = draw(bench, heads, what)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        return attend(way, *leaves, what)

    began = time.perf_counter()
    try:
        with torch.no_grad():
            forward()
    except InputError as error:
        yield "refused", refusal(error), ""
        return
    device.wait()
    yield "first call", time.perf_counter() - began, "s"
    flops = 4 * heads.D * heads.H * rows * length * (length + 1) // 2
    repeats = bench.scale.repeats
    with torch.no_grad():
        seconds = device.seconds(forward, repeats)
    yield "forward", 1e3 * seconds, "ms"
    yield "forward rate", flops / seconds / 1e12, "TFLOP/s"
    began = time.perf_counter()
    try:
        torch.autograd.grad(forward(), leaves, grad)
    except InputError as error:
        yield "backward refused", refusal(error), ""
        return
    device.wait()
    yield "first backward", time.perf_counter() - began, "s"
    seconds = device.seconds(lambda: torch.autograd.grad(forward(), leaves, grad), repeats)
    yield "with backward", 1e3 * seconds, "ms"
    yield "rate with backward", 3.5 * flops / seconds / 1e12, "TFLOP/s"


def flex(bench: Bench) -> list[Case]:
    """Of RoPE's heads: documents and their speed, the same with ALiBi, then all other kinds; then
    the other variants' heads. One kind a case: each is compiled."""
    shapes = heads_of(bench.scale.models["376m"])
    cases = []
    for slopes in (False, True):
        kind = "documents, ALiBi" if slopes else "documents"
        cases.append(_flex_case(bench, shapes, "RoPE", kind))
        for rows, length in bench.scale.layouts:
            name = f"RoPE {rows} x {length}, {kind}"
            run = partial(time_attention, bench, shapes["RoPE"], rows, length, "flex", slopes)
            cases.append(Case(name, run, "attention"))
    rest = [kind for kind in KINDS if not kind.startswith("documents") or "<" in kind]
    cases += [_flex_case(bench, shapes, "RoPE", kind) for kind in rest]
    others = product(("EC", "EH"), ("documents", "documents, ALiBi"))
    return cases + [_flex_case(bench, shapes, variant, kind) for variant, kind in others]


def _flex_case(bench: Bench, shapes: dict[str, Heads], variant: str, kind: str) -> Case:
    return Case(f"{variant} {kind}", partial(compiled, bench, shapes[variant], kind), "parity")


def compiled(bench: Bench, heads: Heads, kind: str) -> Iterator[Figure]:
    """Parity, and how many graphs it took."""
    from torch._dynamo.utils import counters

    counters.clear()
    began = time.perf_counter()
    for name, value, unit in compare(bench, "flex", heads, (kind,)):
        # The kind is in the row's name.
        yield name.replace(kind, "relative L2"), value, unit
    yield "seconds", time.perf_counter() - began, "s"
    yield "graphs", float(counters["stats"]["unique_graphs"]), ""
