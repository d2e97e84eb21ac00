"""Benchmarks of what large runs use: compilation, recomputation, shards, shared rows, checkpoints.

Where there are several processes they are on this machine's CPU, one thread each, and talk through
gloo: what is measured is the code's own share, not what a network between nodes costs. They take
turns with a single process as the sides of `measure.alternate` do. Run by scripts/bench.
"""

import os
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from measure import (
    CONFIG,
    DEVICE,
    DTYPES,
    LENGTH,
    ROWS,
    SPECS,
    Step,
    alternate,
    forget_peak,
    in_processes,
    milliseconds,
    optimizer_step,
    random_rows,
    ratio,
    training_step,
)
from ropepp.model import Transformer
from ropepp.model.positions import Position, RoPE
from ropepp.model.sequence import SequenceGroup
from ropepp.runs.machine import peak_memory_bytes
from ropepp.train.module import LanguageModel
from ropepp.train.strategy import FSDP2Strategy, shard

RUNS = Path(__file__).resolve().parent.parent / "logs"  # on the disk that holds checkpoints
Times = dict[str, list[float]]


def cores() -> str:
    """How many this machine lets us use."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{number} cores"


def bench_compile() -> list[str]:
    """RoPE's training step with each block compiled, against the same step without."""
    lines = ["| training step | plain | compiled | time ratio | first step |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, dtype in DTYPES.items():
        sides = {"plain": training_step(RoPE(), dtype)}
        sides["compiled"] = training_step(RoPE(), dtype, compiled=True)
        start = time.perf_counter()
        # What a run waits for that finds nothing compiled before, in this process either.
        torch.compiler.reset()
        uncached = torch.compiler.config.patch(force_disable_caches=True)
        with warnings.catch_warnings(action="ignore"), uncached:
            sides["compiled"]()
        first = time.perf_counter() - start
        times = alternate(sides, 15)
        lines.append(
            f"| {name} | {milliseconds(times['plain'])} | {milliseconds(times['compiled'])} | "
            f"{ratio(times['compiled'], times['plain'])} | {first:.1f} s |"
        )
    return lines


def step_memory(variant: str, every: int) -> int:
    """Bytes that a training step with every n-th block recomputed adds at its peak to weights and
    optimizer state."""
    model = Transformer(replace(CONFIG, num_layers=8), SPECS[variant]).to(DEVICE)
    model.set_recompute(every)
    step = optimizer_step(model, random_rows(ROWS, LENGTH))
    step()
    forget_peak()
    before = peak_memory_bytes(DEVICE)
    step()
    return peak_memory_bytes(DEVICE) - before


def bench_memory() -> list[str]:
    """What a training step adds at its peak to weights and optimizer state, each in a process of
    its own; 8 layers, float32."""
    lines = ["| activation checkpointing | variant | memory | of none | of RoPE's |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    names = {0: "none", 2: "every second block", 1: "every block"}
    # Freed tensors go back to the system at once, so that the resident size is that of what lives.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = {(v, n): in_processes(1, step_memory, v, n) for n in names for v in SPECS}
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    for (variant, every), size in found.items():
        lines.append(
            f"| {names[every]} | {variant} | {size / 1e6:.0f} MB | "
            f"{size / found[variant, 0]:.2f} | {size / found['RoPE', every]:.2f} |"
        )
    return lines


def sharded_step(
    spec: Position,
    dtype: torch.dtype,
    mesh: DeviceMesh,
    ids: Tensor,
    sequence: SequenceGroup | None = None,
) -> Step:
    """A training step of a model that is sharded over ``mesh``."""
    with torch.device("meta"):
        model = Transformer(CONFIG, spec, compute_dtype=dtype)
    shard(model, mesh)
    model.to_empty(device=mesh.device_type)
    model.initialize(0)
    model.sequence = sequence
    return optimizer_step(model, ids)


def alone_and_together(alone: Step, together: Step, rounds: int) -> Times:
    """Seconds of a step in the first process while the others sleep, and of one in all."""

    def in_first() -> None:
        if dist.get_rank() == 0:
            alone()
        dist.barrier()

    def in_all() -> None:
        together()
        dist.barrier()

    return alternate({"alone": in_first, "together": in_all}, rounds)


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """Each process alone, and all of them."""
    world = dist.get_world_size()
    both = init_device_mesh("cpu", (world, 1), mesh_dim_names=("all", "one"))
    return both["one"], both["all"]


def scaling_times(dtype: str) -> Times:
    one, both = meshes()
    ids = torch.randint(CONFIG.vocab_size, (ROWS // 2, LENGTH + 1))
    steps = [sharded_step(RoPE(), DTYPES[dtype], mesh, ids) for mesh in (one, both)]
    return alone_and_together(*steps, rounds=12)


def bench_scaling() -> list[str]:
    """Weak scaling over 1 and 2 processes of one thread with FSDP2, 1024 tokens a process; the
    efficiency is half the tokens per second of 2 processes over those of one."""
    lines = [f"| RoPE, {cores()} | 1 process | 2 processes | efficiency |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    tokens = ROWS // 2 * LENGTH
    for dtype in DTYPES:
        times = in_processes(2, scaling_times, dtype)
        rates = {
            name: n * tokens / statistics.median(times[name])
            for n, name in ((1, "alone"), (2, "together"))
        }
        lines.append(
            f"| {dtype} | {rates['alone']:,.0f} tokens/s | {rates['together']:,.0f} tokens/s | "
            f"{ratio(times['alone'], times['together'])} |"
        )
    return lines


SHARED_LENGTH = 2048


def shared_times(variant: str) -> tuple[Times, int]:
    """Also the bytes that a process receives in a forward pass."""
    spec, (one, both) = SPECS[variant], meshes()
    sequence = SequenceGroup(both.get_group())
    ids = torch.randint(CONFIG.vocab_size, (1, SHARED_LENGTH + 1))
    steps = [
        sharded_step(spec, torch.float32, one, ids),
        sharded_step(spec, torch.float32, both, ids, sequence),
    ]
    kv_heads = spec.layout(CONFIG.num_heads, CONFIG.num_kv_heads).num_kv_heads
    size = sequence.bytes_gathered(1, SHARED_LENGTH, kv_heads, CONFIG.head_dim, 4)
    return alone_and_together(*steps, rounds=6), size * CONFIG.num_layers


def bench_shared_rows() -> list[str]:
    """One row of 2048 tokens shared by 2 processes (context parallelism, FSDP2, float32), against
    one process; half the time would be ideal. Each process receives the other's keys and values in
    a forward pass."""
    lines = [f"| {cores()} | 1 process | 2 processes | time ratio | bytes received |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for variant in SPECS:
        times, size = in_processes(2, shared_times, variant)
        lines.append(
            f"| {variant} | {milliseconds(times['alone'])} | {milliseconds(times['together'])} | "
            f"{ratio(times['together'], times['alone'])} | {size:,} |"
        )
    return lines


class CheckpointTimer(pl.Callback):
    """Saves after every second step, synchronously and then asynchronously, and resumes in between;
    the step after is made while the asynchronous save is written.

    Args:
        folder: Where the checkpoints go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size = 0
        self.times: Times = {
            name: [] for name in ("synchronous", "blocked", "written", "resume", "quiet", "writing")
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, FSDP2Strategy)
        seconds = time.perf_counter() - self._start
        if batch_idx % 2:
            self.times["writing"].append(seconds)
            strategy.wait_for_save()
            strategy.barrier()
            self.times["written"].append(time.perf_counter() - self._began)
            return
        self.times["quiet"].append(seconds)
        path = self.folder / "saved.ckpt"
        strategy.asynchronous_save = False
        self._time("synchronous", lambda: trainer.save_checkpoint(path))
        self.size = sum(file.stat().st_size for file in path.iterdir())
        self._time("resume", lambda: strategy.load_checkpoint(path, weights_only=True))
        strategy.asynchronous_save = True
        self._began = time.perf_counter()
        self._time("blocked", lambda: trainer.save_checkpoint(path))

    def _time(self, name: str, step: Step) -> None:
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        self.times[name].append(time.perf_counter() - start)


def checkpoint_times(folder: str, rounds: int) -> tuple[Times, int]:
    """Also the size of a checkpoint in bytes. The first round, which warms up, is left out."""
    timer = CheckpointTimer(Path(folder))
    trainer = pl.Trainer(
        strategy=FSDP2Strategy(asynchronous_save=True),
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_steps=2 * rounds + 2,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    ids = torch.randint(CONFIG.vocab_size, (1, LENGTH + 1))
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "num_targets": 2 * LENGTH}
    loader = DataLoader([batch] * (2 * rounds + 2), batch_size=None)
    trainer.fit(LanguageModel(CONFIG, RoPE()), loader)
    return {name: own[1:] for name, own in timer.times.items()}, timer.size


def bench_checkpoints() -> list[str]:
    """Saving and resuming a sharded checkpoint (weights and AdamW's state) with 2 processes. What
    is read was just written, and comes from memory."""
    with tempfile.TemporaryDirectory(dir=RUNS, prefix="bench-") as folder:
        times, size = in_processes(2, checkpoint_times, folder, 10)
    lines = [f"| {size / 1e6:.1f} MB | median | of a synchronous save | MB/s |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for label, name in (
        ("synchronous save", "synchronous"),
        ("asynchronous save: training waits", "blocked"),
        ("asynchronous save: until written, with a step", "written"),
        ("resume", "resume"),
    ):
        speed = "" if name == "blocked" else f"{size / 1e6 / statistics.median(times[name]):,.0f}"
        lines.append(
            f"| {label} | {milliseconds(times[name])} | "
            f"{ratio(times[name], times['synchronous'])} | {speed} |"
        )
    slower = ratio(times["writing"], times["quiet"])
    return [*lines, "", f"A step while it is written takes {slower} of an undisturbed one's time."]


BENCHMARKS = {
    "compile": bench_compile,
    "memory": bench_memory,
    "scaling": bench_scaling,
    "shared_rows": bench_shared_rows,
    "checkpoints": bench_checkpoints,
}
