"""What the stages of gpu_check run on: a GPU, or a processor in its place at toy size, with the
same operations; and how large everything is on either.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

from ropepp.model import ModelConfig, Transformer
from ropepp.runs.machine import device_name, peak_flops, peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("376m", "776m")
DTYPE = torch.bfloat16
TOLERANCE = 1e-2  # relative L2 of what is computed in it

# What a measurement found: a name, a number or words, and the unit.
Figure = tuple[str, float | str, str]


@dataclass(frozen=True)
class Case:
    """One measurement, between which a stage may be cut.

    Args:
        name: Of the row in the table.
        run: Yields what it finds; raises what went wrong.
        table: Which of the stage's tables it belongs to.
        compiles: Whether something may have been compiled that the next has to forget.
    """

    name: str
    run: Callable[[], Iterable[Figure]]
    table: str = ""
    compiles: bool = True


class Cpu:
    """A processor that stands in for a GPU."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.name = device_name(self.device)
        self.peak_flops = peak_flops(self.device)
        self._ceilings: dict[str, float] = {}

    def wait(self) -> None:
        """Until all work is done."""

    def mark(self) -> Any:
        """A point in the device's time."""
        return time.perf_counter()

    def between(self, one: Any, other: Any) -> float:
        """Seconds from a mark to a later one."""
        return other - one

    def times(self, step: Callable[[], object], repeats: int = 5, warmup: int = 2) -> list[float]:
        """Seconds of each of several calls, after some that do not count."""
        for _ in range(warmup):
            step()
        self.wait()
        marks = [self.mark()]
        for _ in range(repeats):
            step()
            marks.append(self.mark())
        self.wait()
        return [self.between(a, b) for a, b in pairwise(marks)]

    def seconds(self, step: Callable[[], object], repeats: int = 5, warmup: int = 2) -> float:
        """The median of these."""
        return statistics.median(self.times(step, repeats, warmup))

    def forget_peak(self) -> None:
        if (file := Path("/proc/self/clear_refs")).exists():
            file.write_text("5")

    def peak(self) -> int:
        """Bytes of memory at the most since the last `forget_peak`."""
        return peak_memory_bytes(self.device)

    def free_bytes(self) -> int:
        """Bytes that can still be had."""
        return 2**32

    def free(self, compiled: bool = True) -> None:
        """Gives back what a measurement took, and forgets what was compiled for it."""
        if compiled:
            torch.compiler.reset()
            gc.collect()

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """A call that repeats the kernels of a step without launching them one by one; here the
        step itself."""
        step()
        return step

    def list_waits(self, on: bool) -> None:
        """Makes torch warn where the host waits for the device, or no more."""
        if on:
            warnings.warn("called a synchronizing CUDA operation (rehearsed)", stacklevel=2)

    @property
    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy."""
        return self._ceilings.get("bandwidth") or self.measure_bandwidth(2**24)

    def measure_bandwidth(self, size: int = 2**31) -> float:
        x = torch.randn(size // 4, device=self.device)
        y = torch.empty_like(x)
        seconds = self.seconds(lambda: y.copy_(x), 9, 3)
        self._ceilings["bandwidth"] = 2 * x.nbytes / seconds
        return self._ceilings["bandwidth"]

    @property
    def product(self) -> float:
        """FLOP/s of a large bfloat16 product."""
        return self._ceilings.get("product") or self.measure_product(128)

    def measure_product(self, size: int = 8192) -> float:
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        seconds = self.seconds(lambda: a @ b, 9, 3)
        self._ceilings["product"] = 2 * size**3 / seconds
        return self._ceilings["product"]

    def usable(self) -> bool:
        """Whether the device still works after an error."""
        return True


class Gpu(Cpu):
    """A CUDA device; times are those between events."""

    device = torch.device("cuda")

    def wait(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: Any, other: Any) -> float:
        other.synchronize()
        return one.elapsed_time(other) / 1e3

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def free(self, compiled: bool = True) -> None:
        super().free(compiled)
        torch.cuda.empty_cache()

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def list_waits(self, on: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    @property
    def bandwidth(self) -> float:
        return self._ceilings.get("bandwidth") or self.measure_bandwidth()

    @property
    def product(self) -> float:
        return self._ceilings.get("product") or self.measure_product()

    def usable(self) -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        models: By name.
        layouts: Rows and tokens in a row of a micro-batch: short rows, one long row.
        product: Rows of the square matrices whose product is timed.
        copied: Bytes of what is copied.
        parity: Tokens in a row where backends are compared.
        repeats: Of which medians are taken.
        steps: Training steps that are measured.
        loss_rows: Rows of a chunk of the loss.
        batches: Rows that are decoded together.
        caches: Tokens that they have read.
    """

    models: dict[str, ModelConfig]
    layouts: tuple[tuple[int, int], tuple[int, int]] = ((8, 4096), (1, 32768))
    product: int = 8192
    copied: int = 2**31
    parity: int = 512
    repeats: int = 7
    steps: int = 8
    loss_rows: tuple[int, ...] = (8192, 2048, 4096, 16384, 1024)
    batches: tuple[int, ...] = (1, 64)
    caches: tuple[int, ...] = (4096, 32768)


@dataclass(frozen=True)
class Bench:
    """What a stage gets."""

    device: Cpu
    scale: Scale
    out: Path = field(default_factory=Path.cwd)

    @property
    def rehearses(self) -> bool:
        return self.device.device.type == "cpu"


def distance(x: Tensor, true: Tensor) -> float:
    return float((x.float() - true).norm() / true.norm().clamp(min=1e-30))


def load_config(size: str) -> ModelConfig:
    """Sizes from configs/model."""
    return ModelConfig(**yaml.safe_load((ROOT / "configs" / "model" / f"{size}.yaml").read_text()))


def bench(rehearse: bool, out: Path) -> Bench:
    """A GPU at full size, or a processor at toy size."""
    if not rehearse:
        return Bench(Gpu(), Scale({size: load_config(size) for size in SIZES}), out)
    toy = ModelConfig(512, 64, 1, 4, 2, 128)
    scale = Scale(
        dict.fromkeys(SIZES, toy), ((2, 48), (1, 96)), 128, 2**20, 40, 3, 2, (32, 64), (1, 2),
        (32, 64),
    )  # fmt: skip
    return Bench(Cpu(), scale, out)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Within, models draw their weights where they are: hundreds of millions of numbers from the
    processor's generators take seconds, and times do not depend on which they are."""
    with mock.patch.object(Transformer, "initialize", _draw):
        yield


@torch.no_grad()
def _draw(model: Transformer, seed: int = 0) -> None:
    model.tie()
    for full_name, tensor in chain(model.named_parameters(), model.named_buffers()):
        owner, _, name = full_name.rpartition(".")
        module = model.get_submodule(owner)
        draw = getattr(module, "initial_value", None)
        if draw is None:
            tensor.normal_(0.0, model.config.init_std * float(getattr(module, "std", 1.0)))
        else:
            tensor.copy_(draw(name, tensor.shape, torch.Generator().manual_seed(seed)))
