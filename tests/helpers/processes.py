"""Runs a function in several processes that talk through gloo."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(world: int, function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(*args)`` in ``world`` processes; an assertion that fails in one fails
    here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (world, folder, function, args), nprocs=world)  # type: ignore[attr-defined]


def _enter(rank: int, world: int, folder: str, function: Callable[..., None], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    try:
        function(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
