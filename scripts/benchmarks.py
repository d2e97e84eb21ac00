"""Benchmarks as ratios: both sides alternate in one process, and medians are compared.

Machines are noisy; a ratio of two sides that took turns is not. Each table row gives the median of
the paired ratios and their middle half. Run by scripts/bench.
"""

import argparse
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepp.data.loading.loader import Rows, TrainLoader
from ropepp.data.loading.mixture import MixtureRows, Schedule
from ropepp.data.packing.concat import ConcatRows
from ropepp.data.tokens.corpus import Corpus
from ropepp.data.tokens.join_shards import join_shards
from ropepp.data.tokens.meta import ShardEntry, shard_folder
from ropepp.data.tokens.tokenizer import load_tokenizer
from ropepp.data.tokens.writer import TokenWriter
from ropepp.files import write_text
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import training_flops
from ropepp.model.loss import cross_entropy_sum, cross_entropy_sum_naive
from ropepp.model.positions import Position, RoPE, RoPEppEC, RoPEppEH
from ropepp.runs.machine import commit, device_name, no_bfloat16, peak_memory_bytes
from ropepp.train.optim import AdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(8192, 256, 4, 4, 2, 704)
ROWS, LENGTH = 8, 256
# A processor without bfloat16 takes tens of times longer with it.
DTYPES = {"float32": torch.float32}
DTYPES |= {} if no_bfloat16(DEVICE) else {"bfloat16": torch.bfloat16}
FASTEST = list(DTYPES)[-1]
Step = Callable[[], object]


def alternate(sides: dict[str, Step], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each side's calls, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warmup):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    """Median of the paired ratios and their middle half."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def milliseconds(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.0f} ms"


def training_step(
    position: Position,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    length: int = LENGTH,
) -> Step:
    """A whole optimizer step of ours on one device."""
    model = Transformer(CONFIG, position, compute_dtype=dtype).to(DEVICE)
    if compiled:
        for block in model.blocks():
            block.compile(dynamic=False)
    return optimizer_step(model, random_rows(ROWS * LENGTH // length, length))


def random_rows(rows: int, length: int) -> Tensor:
    """Token ids (rows, length + 1)."""
    return torch.randint(CONFIG.vocab_size, (rows, length + 1), device=DEVICE)


def optimizer_step(model: Transformer, ids: Tensor) -> Step:
    """Forward, backward, clipping, AdamW; of a model that may be sharded."""
    optimizer = AdamW().build(model)

    def step() -> None:
        total, count = model.loss(ids[:, :-1], ids[:, 1:])
        (total / count).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def llama_step() -> Step:
    """The same of transformers' Llama of the same sizes, float32, with the same optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.ffn_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        rms_norm_eps=CONFIG.norm_eps,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    optimizer = AdamW().build(model)
    ids = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH + 1), device=DEVICE)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_variants() -> list[str]:
    """Step time of EC and EH over RoPE's beside the ratio of their FLOPs."""
    lines = ["| step over RoPE's | length | time ratio | FLOP ratio | time / FLOPs |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    specs = {"RoPE": RoPE(), "EC": RoPEppEC(), "EH": RoPEppEH()}
    kinds = {name: (dtype, False) for name, dtype in DTYPES.items()}
    kinds[f"{FASTEST}, compiled"] = (DTYPES[FASTEST], True)
    for (kind, how), length in itertools.product(kinds.items(), (256, 1024)):
        steps = {name: training_step(spec, *how, length=length) for name, spec in specs.items()}
        times = alternate(steps, 15)
        flops = {
            name: training_flops(Transformer(CONFIG, p), length, length * (length + 1) // 2)
            for name, p in specs.items()
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


def bench_llama() -> list[str]:
    """Our RoPE step against transformers' Llama in float32."""
    sides = {"transformers, float32": llama_step()}
    sides |= {f"ours, {name}": training_step(RoPE(), dtype) for name, dtype in DTYPES.items()}
    sides[f"ours, {FASTEST}, compiled"] = training_step(RoPE(), DTYPES[FASTEST], compiled=True)
    times = alternate(sides, 15)
    base = times["transformers, float32"]
    lines = ["| training step | median | speed over transformers' |", "| --- | ---: | ---: |"]
    return lines + [f"| {n} | {milliseconds(t)} | {ratio(base, t)} |" for n, t in times.items()]


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
    memory = {
        name: int(
            subprocess.run(
                [sys.executable, __file__, "--loss-memory", name],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for name in LOSSES
    }  # fmt: skip
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
        mixture = MixtureRows(parts, Schedule.of([0.7, 0.2, 0.1]))
        for micro in (4, 16):
            loaders = {
                "one": TrainLoader(one, micro, micro),
                "mixture": TrainLoader(mixture, micro, micro, order=mixture.order(0)),
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
    "llama": bench_llama,
    "loss": bench_loss,
    "loader": bench_loader,
}


def main() -> None:
    import bench_decode  # here, because they use what is above
    import bench_scale

    BENCHMARKS.update(bench_scale.BENCHMARKS | bench_decode.BENCHMARKS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all by default"
    )
    parser.add_argument("--out", type=Path, help="also write the tables there")
    parser.add_argument("--loss-memory", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loss_memory:
        print(loss_memory(options.loss_memory))
        return
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(BENCHMARKS)}")
    names = options.names or list(BENCHMARKS)
    text = [
        "# Bench",
        "",
        f"`scripts/bench {' '.join(options.names)}`".replace(" `", "`"),
        f"on {device_name(DEVICE)}, torch {torch.__version__}, commit {commit()}. Model "
        f"{json.dumps({k: v for k, v in vars(CONFIG).items() if isinstance(v, int) and v > 1})}, "
        f"{ROWS * LENGTH} tokens a step. Medians; in brackets the middle half of the ratios.",
    ]
    print("\n".join(text), flush=True)
    start = time.perf_counter()
    for number, name in enumerate(names, 1):
        minutes = (time.perf_counter() - start) / 60
        print(f"{name}: {number} of {len(names)}, {minutes:.0f} min", file=sys.stderr, flush=True)
        section = ["", f"## {name}", "", inspect.getdoc(BENCHMARKS[name]) or "", ""]
        section += BENCHMARKS[name]()
        print("\n".join(section), flush=True)
        text += section
    if options.out:
        write_text(options.out, "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
