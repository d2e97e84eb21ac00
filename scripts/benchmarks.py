"""Runs the benchmarks and writes their tables; see `measure` for how. Run by scripts/bench."""

import argparse
import inspect
import json
import sys
import time
from pathlib import Path

import torch

import bench_decode
import bench_peers
import bench_scale
import bench_train
from measure import CONFIG, DEVICE, LENGTH, ROWS
from ropepp.files import write_text
from ropepp.runs.machine import commit, device_name

BENCHMARKS = bench_train.BENCHMARKS | bench_scale.BENCHMARKS | bench_decode.BENCHMARKS
BENCHMARKS |= bench_peers.BENCHMARKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all by default"
    )
    parser.add_argument("--out", type=Path, help="also write the tables there")
    options = parser.parse_args()
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
