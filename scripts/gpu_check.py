"""What a GPU does with a training step: tokens and FLOP/s, share of its peak, memory.

A step is forward, backward, clipping and AdamW, with bfloat16 compute, compiled blocks and the
chunked loss, on rows of random tokens that are one document each. FLOPs are the model's own
(`ropepp.model.flops`), without what is recomputed. Run by scripts/gpu_check.
"""

import argparse
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from measure import SPECS, Step, optimizer_step
from ropepp.files import write_text
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import training_flops
from ropepp.model.positions import Position
from ropepp.runs.machine import commit, device_name, peak_flops, peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("376m", "776m")
LENGTHS = (4096, 32768)
TOKENS = 131072  # of a micro-batch to begin with; as many as fit are better for the matrix products
WARMUP, STEPS = 3, 10
HEADER = (
    "| model | position | length | rows | step | tokens/s | TFLOP/s | MFU | peak memory |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


@dataclass(frozen=True)
class Measurement:
    """Of one training step.

    Args:
        rows: Rows of the micro-batch.
        length: Tokens in a row.
        seconds: Median time of a step.
        flops: Model FLOPs of a step.
        peak: The device's dense bfloat16 FLOP/s, if known.
        memory: Peak memory in bytes.
    """

    rows: int
    length: int
    seconds: float
    flops: int
    peak: float | None
    memory: int

    def cells(self) -> str:
        """The columns of a table after model, position and length."""
        rate = self.flops / self.seconds
        mfu = "-" if self.peak is None else f"{rate / self.peak:.1%}"
        return (
            f"{self.rows} | {1000 * self.seconds:.0f} ms | "
            f"{self.rows * self.length / self.seconds:,.0f} | {rate / 1e12:.1f} | {mfu} | "
            f"{self.memory / 2**30:.1f} GiB"
        )


def load_config(size: str) -> ModelConfig:
    """Sizes from configs/model."""
    return ModelConfig(**yaml.safe_load((ROOT / "configs" / "model" / f"{size}.yaml").read_text()))


def measure(
    config: ModelConfig,
    position: Position,
    length: int,
    device: torch.device,
    *,
    tokens: int = TOKENS,
    compiled: bool = True,
    warmup: int = WARMUP,
    steps: int = STEPS,
) -> Measurement | None:
    """Measures training steps of the largest micro-batch that fits, beginning with ``tokens`` and
    halving; None if not even one row does."""
    rows = max(1, tokens // length)
    while rows:
        try:
            return _measure(config, position, length, rows, device, compiled, warmup, steps)
        except torch.OutOfMemoryError:
            pass  # freed below, where the error no longer holds the tensors of its frames
        free(device)
        rows //= 2
    return None


def _measure(
    config: ModelConfig,
    position: Position,
    length: int,
    rows: int,
    device: torch.device,
    compiled: bool,
    warmup: int,
    steps: int,
) -> Measurement:
    model = Transformer(config, position, compute_dtype=torch.bfloat16).to(device)
    step = training_step(model, rows, length, device, compiled)
    for _ in range(warmup):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    pairs = rows * length * (length + 1) // 2
    return Measurement(
        rows,
        length,
        statistics.median(times),
        training_flops(model, rows * length, pairs),
        peak_flops(device),
        peak_memory_bytes(device),
    )


def training_step(
    model: Transformer, rows: int, length: int, device: torch.device, compiled: bool
) -> Step:
    """A whole optimizer step as `ropepp.train.module` makes it."""
    if compiled:
        for block in model.blocks():
            block.compile(dynamic=False)
    ids = torch.randint(model.config.vocab_size, (rows, length + 1), device=device)
    return optimizer_step(model, ids)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Gives back what the last model took, and forgets what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(
    sizes: dict[str, ModelConfig],
    lengths: list[int],
    device: torch.device,
    measured: Callable[..., Measurement | None] = measure,
) -> Iterator[str]:
    """Lines of the table as they are measured."""
    yield from HEADER
    for (size, config), length, (name, position) in itertools.product(
        sizes.items(), lengths, SPECS.items()
    ):
        result = measured(config, position, length, device)
        cells = "does not fit | - | - | - | - | -" if result is None else result.cells()
        yield f"| {size} | {name} | {length} | {cells} |"
        free(device)


def run_tests() -> str:
    """Runs the tests that need a GPU; says how they ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-rs"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return "passed" if code == 0 else f"FAILED (exit code {code})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="files of configs/model")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--no-tests", action="store_true", help="measure alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu_check needs a CUDA GPU; torch {torch.__version__} finds none", file=sys.stderr)
        sys.exit(2)
    sizes = {size: load_config(size) for size in options.sizes}
    device = torch.device("cuda")
    tests = "not run" if options.no_tests else run_tests()
    lines = [
        "# On a GPU",
        "",
        " ".join(["`scripts/gpu_check", *sys.argv[1:]]) + "`",
        f"on {device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit "
        f"{commit()}. Tests that need a GPU: {tests}.",
        "",
        f"{(__doc__ or '').split('Run by')[0].strip()} Rows are halved from {TOKENS} tokens until "
        f"they fit. Medians of {STEPS} steps after {WARMUP}; MFU is against the dense bfloat16 "
        "peak of the data sheet.",
        "",
    ]
    print("\n".join(lines), flush=True)
    for line in table(sizes, options.lengths, device):
        print(line, flush=True)
        lines.append(line)
        write_text(options.out, "\n".join(lines) + "\n")
    if tests.startswith("FAILED"):
        sys.exit(1)


if __name__ == "__main__":
    main()
