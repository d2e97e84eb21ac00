"""Training steps beside transformers' and litgpt's at equal precision. Run by scripts/bench."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import environment
from measure import DTYPES, FASTEST, SPECS, ratio
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import training_flops

LITGPT = "litgpt==0.5.13"
PEERS = ("transformers", "litgpt")
# Where not all models are in memory at a time, RoPE is in both groups.
WITH_PEERS, VARIANTS = ("bare", *PEERS, "RoPE"), ("RoPE", "EC", "EH")


class Size(NamedTuple):
    """What all sides train, and how often: the largest in the fastest precision alone."""

    config: ModelConfig
    rows: int
    length: int
    rounds: int
    dtypes: tuple[str, ...] = tuple(reversed(DTYPES))
    groups: tuple[tuple[str, ...], ...] = ((*WITH_PEERS, "EC", "EH"),)


SIZES = {
    "4 layers x 256, V 8192, 4 x 512": Size(ModelConfig(8192, 256, 4, 4, 2, 704), 4, 512, 9),
    "6 layers x 512, V 32000, 1 x 1024": Size(ModelConfig(32000, 512, 6, 8, 4, 1408), 1, 1024, 7),
    "12 layers x 768, V 32000, 1 x 2048": Size(
        ModelConfig(32000, 768, 12, 12, 6, 2048), 1, 2048, 3, (FASTEST,), (WITH_PEERS, VARIANTS)
    ),
}


@dataclass
class Side:
    """A running process of scripts/peer.py.

    Args:
        process: Its pipes are open.
        seconds: Of the measured steps.
        first: Seconds of the first step, compilation included.
        peak: Bytes that the process had at most.
    """

    process: "subprocess.Popen[str]"
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    peak: int = 0

    def steps(self, count: int) -> list[float]:
        """Seconds of the next steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(count, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side of the benchmark ended: {self.process.args!r}")
        answer: dict[str, Any] = json.loads(line)
        self.peak = answer["peak"]
        return list(answer["seconds"])


def start(name: str, size: str, dtype: str, compiled: bool, cache: str) -> Side:
    """Starts a side, litgpt in its own environment; its compiler finds nothing it made before."""
    config, rows, length = SIZES[size][:3]
    python = environment.prepare_package(LITGPT) if name == "litgpt" else Path(sys.executable)
    sizes = {k: v for k, v in vars(config).items() if isinstance(v, int) and v > 1}
    command = [str(python), str(Path(__file__).with_name("peer.py")), "--side", name]
    command += ["--sizes", json.dumps(sizes), "--rows", str(rows), "--length", str(length)]
    command += ["--dtype", dtype, *(["--compiled"] if compiled else [])]
    own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache, name))}
    pipe = subprocess.PIPE
    return Side(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=own))


def measure(names: tuple[str, ...], size: str, dtype: str, compiled: bool) -> dict[str, Side]:
    """Steps of all sides in turns."""
    with tempfile.TemporaryDirectory() as cache:
        sides = {name: start(name, size, dtype, compiled, cache) for name in names}
        try:
            for side in sides.values():
                side.first = side.steps(1)[0]
                side.steps(1)
            for _ in range(SIZES[size].rounds):
                for side in sides.values():
                    side.seconds += side.steps(1)
        finally:
            for side in sides.values():
                side.process.communicate()
    return sides


def flop_ratio(size: str, name: str) -> float:
    """FLOPs of a variant's step over RoPE's."""
    config, length = SIZES[size].config, SIZES[size].length
    own, rope = (
        training_flops(Transformer(config, SPECS[n]), length, length * (length + 1) // 2)
        for n in (name, "RoPE")
    )
    return own / rope


def bench_peers() -> list[str]:
    """Training steps at equal precision and compilation. Above: speed over transformers' (ratios
    in one group of processes that take turns; the bare matrix products and attention of RoPE's step
    are the ceiling). Below: time over RoPE's beside the ratio of FLOPs. Memory is the whole
    process's peak; the first step includes compilation, with an empty cache."""
    lines = [
        "| model | precision | side | step | speed over transformers' | RoPE's speed over it "
        "| first step | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    below = [
        "| model | precision | side | step | time over RoPE's | FLOP ratio | time / FLOPs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for size, what in SIZES.items():
        for dtype, compiled in product(what.dtypes, (True, False)):
            kind = f"{size} | {dtype}{', compiled' if compiled else ''}"
            for names in what.groups:
                found = measure(names, size, dtype, compiled)
                if "transformers" in names:
                    lines += [row(kind, name, found) for name in names if name not in VARIANTS[1:]]
                below += [
                    row_below(kind, size, name, found) for name in VARIANTS[1:] if name in found
                ]
            # What is measured is not lost if the rest is not waited for.
            print(
                "\n".join(x for x in lines + below if x.startswith(f"| {kind} |")),
                file=sys.stderr,
                flush=True,
            )
    return [*lines, "", *below]


def row_below(kind: str, size: str, name: str, found: dict[str, Side]) -> str:
    """A line of the second table."""
    own, rope, share = found[name].seconds, found["RoPE"].seconds, flop_ratio(size, name)
    time = statistics.median(a / b for a, b in zip(own, rope, strict=True))
    return (
        f"| {kind} | {name} | {1000 * statistics.median(own):.0f} ms | {ratio(own, rope)} | "
        f"{share:.2f} | {time / share:.2f} |"
    )


def row(kind: str, name: str, found: dict[str, Side]) -> str:
    """A line of the first table."""
    side = found[name]
    own = side.seconds
    return (
        f"| {kind} | {name} | {1000 * statistics.median(own):.0f} ms | "
        f"{ratio(found['transformers'].seconds, own)} | {ratio(own, found['RoPE'].seconds)} | "
        f"{side.first:.1f} s | {side.peak / 2**30:.2f} GiB |"
    )


BENCHMARKS = {"peers": bench_peers}
