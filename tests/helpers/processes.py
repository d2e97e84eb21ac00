"""Runs a function in several processes that talk through gloo."""

import multiprocessing.spawn
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers import warm_python


def spawn(world: int, function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(*args)`` in ``world`` processes, forks of a warm one; an assertion that
    fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder, warm_children():
        mp.spawn(_enter, (world, folder, function, args), nprocs=world)  # type: ignore[attr-defined]


@contextmanager
def warm_children() -> Iterator[None]:
    """What multiprocessing spawns meanwhile are forks of a warm process."""
    resource_tracker.ensure_running()  # which is to outlive this
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(warm_python.python())
    try:
        yield
    finally:
        multiprocessing.set_executable(before)


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
