"""What the benchmarks measure with: sides that take turns, training steps, processes of their own.

Machines are noisy; a ratio of two sides that took turns in one process is not. A ratio is given as
the median of the paired ratios and their middle half.
"""

import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import Position, RoPE, RoPEppEC, RoPEppEH
from ropepp.runs.machine import no_bfloat16
from ropepp.train.optim import AdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(8192, 256, 4, 4, 2, 704)
ROWS, LENGTH = 8, 256
# A processor without bfloat16 takes tens of times longer with it.
DTYPES = {"float32": torch.float32}
DTYPES |= {} if no_bfloat16(DEVICE) else {"bfloat16": torch.bfloat16}
FASTEST = list(DTYPES)[-1]
SPECS: dict[str, Position] = {"RoPE": RoPE(), "EC": RoPEppEC(), "EH": RoPEppEH()}
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


def in_processes(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in the first of ``world`` new processes, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (world, folder, function, args), nprocs=world)
        return json.loads(Path(folder, "result.json").read_text())


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # what Lightning looks at
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # in every process again what the command line's runs say too
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store = dist.FileStore(str(Path(folder, "store")), world)
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        result = function(*args)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats(DEVICE)
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")
