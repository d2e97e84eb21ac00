"""Benchmarks of a training step and its parts on one device. Run by scripts/bench."""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from measure import (
    CONFIG,
    DEVICE,
    DTYPES,
    FASTEST,
    SPECS,
    Step,
    alternate,
    in_processes,
    milliseconds,
    ratio,
    training_step,
)
from ropepp.data.loading.loader import Rows, TrainLoader
from ropepp.data.loading.mixture import MixtureOrder, MixtureRows, MixtureSchedule
from ropepp.data.packing.concat import ConcatRows
from ropepp.data.tokenizer import load_tokenizer
from ropepp.data.tokens.corpus import Corpus, ShardEntry, join_shards, shard_folder
from ropepp.data.tokens.writer import TokenWriter
from ropepp.model import Transformer
from ropepp.model.flops import training_flops
from ropepp.model.loss import cross_entropy_sum, cross_entropy_sum_naive
from ropepp.runs.machine import peak_memory_bytes


def bench_variants() -> list[str]:
    """Step time of EC and EH over RoPE's beside the ratio of their FLOPs."""
    lines = ["| step over RoPE's | length | time ratio | FLOP ratio | time / FLOPs |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    kinds = {name: (dtype, False) for name, dtype in DTYPES.items()}
    kinds[f"{FASTEST}, compiled"] = (DTYPES[FASTEST], True)
    for (kind, how), length in itertools.product(kinds.items(), (256, 1024)):
        steps = {name: training_step(spec, *how, length=length) for name, spec in SPECS.items()}
        times = alternate(steps, 15)
        flops = {
            name: training_flops(Transformer(CONFIG, p), length, length * (length + 1) // 2)
            for name, p in SPECS.items()
        }
        for name in ("EC", "EH"):
            expected = flops[name] / flops["RoPE"]
            measured = statistics.median(
                a / b for a, b in zip(times[name], times["RoPE"], strict=True)
            )
            lines.append(
                f"| {name}, {kind} | {length} | "
                f"{ratio(times[name], times['RoPE'])} | {expected:.2f} | "
                f"{measured / expected:.2f} |"
            )
    return lines


LOSSES = {"chunked": cross_entropy_sum, "naive": cross_entropy_sum_naive}


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2048, 256, device=DEVICE, requires_grad=True)
    weight = torch.randn(128256, 256, device=DEVICE).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(128256, (2048,), device=DEVICE)


def loss_memory(name: str) -> int:
    """Bytes that one forward and backward adds to the peak, in a process of its own."""
    inputs = loss_inputs()
    before = peak_memory_bytes(DEVICE)
    LOSSES[name](*inputs).backward()
    return peak_memory_bytes(DEVICE) - before


def bench_loss() -> list[str]:
    """Time and peak memory of the loss at a vocabulary of 128256, against all logits at once."""
    hidden, weight, targets = loss_inputs()

    def run(function: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))

    times = alternate({name: run(function) for name, function in LOSSES.items()}, 4, warmup=1)
    memory = {name: in_processes(1, loss_memory, name) for name in LOSSES}
    lines = ["| loss, 2048 tokens | median | time over naive | memory | of naive |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, own in times.items():
        share = memory[name] / memory["naive"]
        lines.append(
            f"| {name} | {milliseconds(own)} | {ratio(own, times['naive'])} | "
            f"{memory[name] / 1e6:.0f} MB | {share:.2f} |"
        )
    return lines


def random_corpus(folder: Path, documents: int) -> Rows:
    """Rows of 4096 tokens of a corpus of bytes that is made in ``folder``."""
    rng = np.random.default_rng(0)
    tokenizer, place = load_tokenizer("bytes"), shard_folder(folder, "random", "train")
    place.mkdir(parents=True)
    with TokenWriter(place, tokenizer) as writer:
        for _ in range(documents):
            writer.append(rng.integers(0, 256, 1000).tolist(), 1000)
        writer.sync()
    entry = ShardEntry("random", **writer.counts_and_checksums())
    join_shards(folder, "train", [entry], tokenizer, "random")
    return ConcatRows(Corpus.open(folder, "train"), 4096)


def bench_loader() -> list[str]:
    """Tokens per second from a memory map to int64 batches, without workers: of one corpus, and of
    a mixture of three, 7 : 2 : 1."""
    lines = ["| loader, rows of 4096 | one corpus | mixture |", "| --- | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as folder:
        one = random_corpus(Path(folder), 20_000)
        parts = {name: random_corpus(Path(folder, name), 7_000) for name in "abc"}
        mixture = MixtureRows(parts, MixtureSchedule.of([0.7, 0.2, 0.1]))
        for micro in (4, 16):
            loaders = {
                "one": TrainLoader(one, micro, micro),
                "mixture": TrainLoader(mixture, micro, micro, order=MixtureOrder(mixture, 0)),
            }
            sides = {n: partial(_read_batches, loader) for n, loader in loaders.items()}
            rates = [
                400 * micro * 4096 / statistics.median(own) / 1e6
                for own in alternate(sides, 7).values()
            ]
            lines.append(f"| micro-batch {micro} | {rates[0]:.0f}M | {rates[1]:.0f}M |")
    return lines


def _read_batches(loader: TrainLoader) -> None:
    for _ in itertools.islice(loader, 400):
        pass


BENCHMARKS = {
    "variants": bench_variants,
    "loss": bench_loss,
    "loader": bench_loader,
}
