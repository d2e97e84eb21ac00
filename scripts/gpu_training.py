"""Stages of gpu_check: training steps as training runs them.

Lightning's loop, this project's module, data module and guard, over rows of random tokens that
several uneven documents share: compiled blocks, bfloat16 compute, chunked loss, clipping, fused
AdamW, one micro-batch a step.
"""

import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from gpu_device import Bench, Case, Cpu, Figure, drawn_on_device
from measure import SPECS
from ropepp.data.loading.datamodule import RowsDataModule
from ropepp.data.loading.loader import Rows
from ropepp.data.packing.concat import ConcatRows
from ropepp.model import ModelConfig
from ropepp.model.flops import training_flops
from ropepp.train.guard import StepGuard
from ropepp.train.module import LanguageModel

WARMUP, LISTED = 3, 2  # steps before those that are measured, and after them with waits listed
TOP = 15


class MadeDocuments(RowsDataModule):
    """Rows of random tokens; documents of about a sixth of a row, the longest many times the
    shortest, or one document a row.

    Args:
        vocab_size: Number of token ids.
        steps: Optimizer steps that there are rows for.
        whole: Whether a row is one document.
        rows: Of a micro-batch.
        length: Tokens in a row.
    """

    vocab_size = 0

    def __init__(self, vocab_size: int, steps: int, whole: bool, rows: int, length: int) -> None:
        super().__init__(length, rows, rows, validate_every_n_steps=0)
        self.vocab_size, self.whole = vocab_size, whole
        draw = np.random.default_rng(0)
        total = steps * rows * length + 1
        sizes = np.exp(draw.normal(np.log(length / 6), 1.0, total // (length // 12)))
        ends = np.cumsum(np.clip(sizes.astype(np.int64), 2, length))
        offsets = np.array([0, *ends[ends < total - 1], total], np.int64)
        tokens = draw.integers(0, vocab_size, total).astype(np.uint32)
        meta = SimpleNamespace(split="train", vocab_size=vocab_size)
        self.corpus: Any = SimpleNamespace(
            tokens=tokens, offsets=offsets, meta=meta, folder="memory"
        )

    def open(self, split: str) -> Rows:
        return ConcatRows(self.corpus, self.sequence_length, mask_documents=not self.whole)

    def documents(self, step: int) -> list[int]:
        """Tokens of each document, or part of one, in the rows of a step."""
        T, size = self.sequence_length, self.global_batch_size
        found: list[int] = []
        for row in self.order().rows(step * size, (step + 1) * size).tolist():
            inside = self.corpus.offsets - row * T
            inside = inside[(inside > 0) & (inside < T)]
            found += [T] if self.whole else np.diff([0, *inside, T]).tolist()
        return found

    def pairs(self, step: int) -> int:
        """Queries with the keys that they see, in a step."""
        return sum(n * (n + 1) // 2 for n in self.documents(step))


def training(bench: Bench, size: str) -> list[Case]:
    """RoPE first; of the larger model no long rows but RoPE's."""
    short, long = bench.scale.layouts
    order = [("RoPE", short), ("RoPE", long), ("EC", short), ("EH", short)]
    order += [("EC", long), ("EH", long)] if size == "376m" else []
    cases = [Case(f"{n} {x[0]} x {x[1]}", partial(train, bench, size, n, *x)) for n, x in order]
    if size == "376m":
        run = partial(train, bench, size, "RoPE", *long, whole=True)
        cases.append(Case(f"RoPE {long[0]} x {long[1]}, one document a row", run))
    return cases


def train(
    bench: Bench, size: str, variant: str, rows: int, length: int, whole: bool = False
) -> Iterator[Figure]:
    """A run of few steps; the first of them compiles."""
    config, device = bench.scale.models[size], bench.device
    first = (size, variant, rows, length) == ("376m", "RoPE", *bench.scale.layouts[0])
    measured = range(WARMUP, WARMUP + bench.scale.steps)
    steps = measured.stop + LISTED + (LISTED if first else 0)
    data = MadeDocuments(config.vocab_size, steps, whole, rows, length)
    planned = planned_memory(config, variant, rows, length, not bench.rehearses)
    # In a rehearsal one model is compiled, because that takes longest.
    compiled = first or not bench.rehearses
    module = LanguageModel(config, SPECS[variant], compute_dtype="bfloat16", compile=compiled)
    probe = Probe(device, measured, bench.out / "profile.txt" if first else None)
    trainer = pl.Trainer(
        accelerator="cpu" if bench.rehearses else "gpu", devices=1, max_steps=steps,
        max_epochs=-1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, inference_mode=False, callbacks=[StepGuard(), probe],
    )  # fmt: skip
    try:
        with drawn_on_device():
            trainer.fit(module, datamodule=data)
    finally:
        device.list_waits(False)
    seconds = statistics.median(probe.seconds)
    flops = [training_flops(module.network, rows * length, data.pairs(s)) for s in measured]
    # Of a step with about as many pairs as others have.
    rate = statistics.median(f / s for f, s in zip(flops, probe.seconds, strict=True))
    sizes = [n for step in measured for n in data.documents(step)]
    yield "step", 1e3 * seconds, "ms"
    yield "tokens/s", rows * length / seconds, ""
    yield "rate", rate / 1e12, "TFLOP/s"
    yield "MFU", 100 * rate / (device.peak_flops or device.product), "%"
    yield "peak memory", probe.peak / 1e9, "GB"
    yield "estimate", planned if isinstance(planned, str) else planned / 1e9, "GB"
    yield "first step", probe.first, "s"
    yield "graphs", float(probe.graphs[0]), ""
    yield "later", float(probe.graphs[1] - probe.graphs[0]), ""
    yield "breaks", float(sum(probe.breaks.values())), ""
    yield "waits a step", sum(probe.waits.values()) / LISTED, ""
    yield "documents a row", len(sizes) / len(measured) / rows, ""
    yield "spread", f"{1e3 * min(probe.seconds):.1f} to {1e3 * max(probe.seconds):.1f} ms", ""
    if first:
        yield "waits", listed(probe.waits), ""
        yield "graph breaks", listed(probe.breaks), ""
        yield "kernels", probe.kernels, ""


def listed(found: Counter[str]) -> str:
    return "; ".join(f"{n} x {what}" for what, n in found.most_common()) or "none"


def planned_memory(
    config: ModelConfig, variant: str, rows: int, length: int, on_gpu: bool
) -> int | str:
    """What ``ropepp estimate`` says, or why it cannot."""
    try:
        from ropepp.train.estimate import PlannedRun, Processes, estimate
    except ModuleNotFoundError as error:
        return f"{error.name} is missing"
    data: Any = SimpleNamespace(
        micro_batch_size=rows, global_batch_size=rows, sequence_length=length
    )
    checkpoint: Any = SimpleNamespace(every_n_steps=0, keep=1)
    module = LanguageModel(config, SPECS[variant], compute_dtype="bfloat16")
    run = PlannedRun(
        module, data, checkpoint, Processes("single", 1), 1, 1, torch.bfloat16, on_gpu, None
    )
    return int(estimate(run)["memory"]["total"])


@dataclass
class Probe(pl.Callback):
    """Watches a run: its first step, the times of some, then waits, then kernels.

    Args:
        device: Where it runs.
        measured: Steps whose times are taken.
        profile_to: Where the kernels that take longest are written, if anywhere.
    """

    device: Cpu
    measured: range
    profile_to: Path | None
    first: float = 0.0
    peak: int = 0
    kernels: str = ""
    graphs: tuple[int, int] = (0, 0)
    breaks: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    _marks: list[Any] = field(default_factory=list)
    _profile: Any = None
    _began: float = 0.0

    @property
    def seconds(self) -> list[float]:
        """Of each step that is measured, from the end of the one before."""
        return [self.device.between(a, b) for a, b in pairwise(self._marks)]

    def on_train_start(self, *args: Any) -> None:
        from torch._dynamo.utils import counters

        counters.clear()
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What comes after a step, and before the next."""
        last = self.measured[-1]
        if batch_idx == 0:
            self.device.wait()
            self.first = time.perf_counter() - self._began
            self.graphs = (self._count_graphs(), 0)
        if batch_idx == self.measured[0] - 1:
            self.device.wait()
            self.device.forget_peak()
        if self.measured[0] - 1 <= batch_idx <= last:
            self._marks.append(self.device.mark())
        if batch_idx == last:
            self.device.wait()
            self.peak = self.device.peak()
            self.graphs = (self.graphs[0], self._count_graphs())
            self._list_waits(True)
        if batch_idx == last + LISTED:
            self._list_waits(False)
            self._begin_profile()

    def on_train_end(self, *args: Any) -> None:
        if self._profile is not None:
            self.device.wait()
            wall = time.perf_counter() - self._began
            try:  # the times are there, whatever becomes of this
                self._profile.__exit__(None, None, None)
                self._write(self._profile.key_averages(), wall)
            except Exception as error:
                self.kernels = f"{type(error).__name__}: {error}"

    def _count_graphs(self) -> int:
        from torch._dynamo.utils import counters

        self.breaks = Counter({k.splitlines()[0]: n for k, n in counters["graph_break"].items()})
        return int(counters["stats"]["unique_graphs"])

    def _list_waits(self, on: bool) -> None:
        if on:
            self._show = warnings.showwarning
            self._filters = warnings.filters[:]
            warnings.simplefilter("always")
            warnings.showwarning = self._note
        self.device.list_waits(on)
        if not on:
            warnings.showwarning = self._show
            warnings.filters[:] = self._filters

    def _note(self, message: Any, *args: Any, **options: Any) -> None:
        if "synchronizing" in str(message):
            self.waits[place(traceback.extract_stack()[:-1])] += 1

    def _begin_profile(self) -> None:
        if self.profile_to is None:
            return
        kinds = [ProfilerActivity.CPU]
        if self.device.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self.device.wait()
        try:
            self._profile = profile(activities=kinds).__enter__()
        except Exception as error:
            self.kernels = f"{type(error).__name__}: {error}"
        self._began = time.perf_counter()

    def _write(self, events: EventList, wall: float) -> None:
        """The kernels that take longest (on a CPU, operations), of all the steps together."""
        gpu = self.device.device.type == "cuda"
        rows = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e) for e in events]
        if gpu:
            # Annotations span kernels that are counted by themselves.
            rows = [
                x
                for x in rows
                if x[1].device_type == torch.autograd.DeviceType.CUDA
                and not getattr(x[1], "is_user_annotation", False)
            ]
        rows.sort(key=lambda x: -x[0])
        total = sum(time for time, _ in rows) or 1.0
        self.kernels = f"{total / 1e4 / wall:.0f}% of the time, see profile.txt"
        lines = [f"{LISTED} steps, {1e3 * wall:.1f} ms, kernels {total / 1e3:.1f} ms", ""]
        lines += ["   ms a step  share  calls  name"]
        lines += [
            f"{time / 1e3 / LISTED:12.3f}  {time / total:5.1%}  {e.count:5d}  {e.key[:200]}"
            for time, e in rows[:TOP]
        ]
        assert self.profile_to is not None
        self.profile_to.write_text("\n".join(lines) + "\n")


def place(stack: list[traceback.FrameSummary]) -> str:
    """The innermost line of this package in a stack, else of Lightning, else of anything."""
    for part in ("/ropepp/", "/lightning/", ""):
        for frame in reversed(stack):
            if part in frame.filename and "/scripts/" not in frame.filename:
                name = frame.filename.rpartition("/src/")[2].rpartition("site-packages/")[2]
                return f"{name}:{frame.lineno} {frame.line}"
    return "?"
