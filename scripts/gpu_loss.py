"""Of gpu_check's stages, what is of the loss: against the definition, and by rows of a chunk."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ropepp.model.loss as loss
from gpu_device import DTYPE, TOLERANCE, Bench, Case, Figure, distance
from ropepp.errors import InputError

LOSSES = {"chunked": loss.cross_entropy_sum, "naive": loss.cross_entropy_sum_naive}


def compare_loss(bench: Bench, backend: str) -> Iterator[Figure]:
    """A loss and its gradients in bfloat16 against the definition in float32 of the same numbers;
    what is large enough for several chunks, with targets that do not count."""
    config, device = bench.scale.models["376m"], bench.device.device
    N, V, M = 17 * bench.scale.parity, config.vocab_size, config.hidden_size
    hidden = torch.randn(N, M, device=device).to(DTYPE)
    weight = torch.randn(V, M, device=device).mul_(0.02).to(DTYPE).float()
    targets = torch.randint(V, (N,), device=device)
    targets[::7] = loss.IGNORE_INDEX

    def outcome(backend: str, wide: bool) -> list[Tensor]:
        leaves = (hidden.float() if wide else hidden).detach(), weight
        leaves = tuple(x.requires_grad_() for x in leaves)
        total = total_loss(backend, *leaves, targets)
        return [total.detach().float(), *torch.autograd.grad(total, leaves)]

    try:
        found = outcome(backend, False)
    except InputError as error:
        yield "refused", str(error), ""
        return
    true = outcome("naive", True)
    errors = {
        name: distance(own, other)
        for name, own, other in zip(("loss", "d hidden", "d weight"), found, true, strict=True)
    }
    for name, value in errors.items():
        yield name, value, ""
    if wrong := {name: value for name, value in errors.items() if not value < TOLERANCE}:
        raise AssertionError(f"relative L2 over {TOLERANCE}: {wrong}")


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Within, the chunked loss takes so many rows at a time."""
    with mock.patch.object(loss, "chunk_rows", return_value=rows):
        yield


def losses(bench: Bench) -> Iterator[Case]:
    def case(name: str, backend: str, rows: int | None = None) -> Case:
        return Case(name, partial(time_loss, bench, backend, rows), "loss")

    yield case("chunked, rows as they are", "chunked")
    for rows in bench.scale.loss_rows:
        yield case(f"chunked, {rows} rows", "chunked", rows)
    yield case("liger", "liger")
    yield case("naive", "naive")


def total_loss(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """One of ours, or Liger-Kernel's, which is there to compare with.

    Raises:
        InputError: That package is missing, or serves no CPU.
    """
    if backend != "liger":
        return LOSSES[backend](hidden, weight, targets)
    if not hidden.is_cuda:
        raise InputError("liger-kernel needs a GPU")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise InputError("the package liger-kernel is missing") from error
    total: Tensor = liger_fused_linear_cross_entropy(
        *(hidden.flatten(0, -2), weight.to(hidden.dtype), targets.flatten()),
        ignore_index=loss.IGNORE_INDEX,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    return total


def time_loss(bench: Bench, backend: str, rows: int | None) -> Iterator[Figure]:
    """Forward and backward of a micro-batch's loss with the vocabulary and width of 376M; the
    output layer in float32, as it is trained. FLOPs are those of its three products."""
    config, device = bench.scale.models["376m"], bench.device
    (B, T), V, M = bench.scale.layouts[0], config.vocab_size, config.hidden_size
    logits = 14 * B * T * V  # float32 three times, and once rounded
    if backend == "naive" and logits > device.free_bytes():
        yield "skipped", f"needs {logits / 1e9:.0f} GB", ""
        return
    hidden = torch.randn(B, T, M, device=device.device).to(DTYPE).requires_grad_()
    weight = torch.randn(V, M, device=device.device).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (B, T), device=device.device)

    def step() -> Any:
        total = total_loss(backend, hidden, weight, targets)
        return torch.autograd.grad(total, (hidden, weight))

    with nullcontext() if rows is None else chunks_of(rows):
        try:
            device.seconds(step, 1, 1)
        except InputError as error:
            yield "skipped", str(error), ""
            return
        except torch.OutOfMemoryError:
            if backend != "naive":
                raise
            yield "skipped", "does not fit", ""
            return
        device.forget_peak()
        before = device.peak()
        seconds = device.seconds(step, bench.scale.repeats, 0)
    yield "forward and backward", 1e3 * seconds, "ms"
    yield "rate", 6 * B * T * V * M / seconds / 1e12, "TFLOP/s"
    yield "memory", (device.peak() - before) / 1e9, "GB"
