"""Sweep folders with made-up runs for tests."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ropepp.files import write_json
from ropepp.runs.records import METRICS, PLAN, RESULT, TRIAL, RunSpec, SweepPlan

NAMES = {"rope": "RoPE", "ec": "RoPE++ EC", "eh": "RoPE++ EH", "fope": "FoPE", "alibi": "ALiBi"}
STEPS, TOKENS_PER_STEP, LENGTH = 300, 2048, 256


def result(variant: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """What a finished run writes; ``changes`` replace or add keys."""
    size = 1000 * (7400 + 10 * len(variant))
    return {
        "variant": variant,
        "seed": seed,
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "parameters": size,
        "kv_cache_bytes_per_token": 1024 if variant == "eh" else 2048,
        "training_flops_per_token": 5.0 * size,
        "sequence_length": LENGTH,
        "train_loss": loss - 0.1,
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
        "evaluation": {"validation/loss": loss, "validation/accuracy": 0.15},
        "tokens_per_second": 4700.0 + 13 * seed,
        "seconds": 138.2,
        "peak_memory_bytes": 1_400_000_000 + seed,
        "device": "AMD EPYC, 2 threads",
        "world_size": 1,
        "finished": f"2026-11-24T13:4{seed % 10}:26Z",
        "commit": "d4074fe452",
        "torch": "2.13.0+cpu",
        **changes,
    }


def write_plan(folder: Path, plan: SweepPlan) -> None:
    write_json(folder / PLAN, asdict(plan))


def write_spec(directory: Path, spec: RunSpec) -> None:
    write_json(directory / TRIAL, asdict(spec))


def write_run(folder: Path, variant: str, seed: int, content: dict[str, Any] | None = None) -> None:
    """One run, finished with the given result or unfinished without; the loss curve ends there."""
    spec = RunSpec(variant, seed, {"seed": seed})
    run = folder / spec.run
    write_spec(run, spec)
    end = content["validation_loss"] if content else 5.0
    random = np.random.default_rng(seed)
    lines = []
    for step in range(10, STEPS + 1, 10):
        loss = (end or 5.0) + 4 * math.exp(-step / 50) + random.normal(scale=0.02)
        tokens = float(step * TOKENS_PER_STEP)
        lines.append({"step": step, "train/loss": loss, "train/tokens": tokens})
        if step % 50 == 0:
            lines.append({"step": step, "validation/loss": loss + 0.1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / METRICS).write_text(text + '{"step": 310, "train/lo')  # a run may be writing
    if content is not None:
        (run / RESULT).write_text(json.dumps(content))


def write_sweep(
    folder: Path,
    losses: Mapping[str, Mapping[int, float]],
    unfinished: Sequence[tuple[str, int]] = (),
    changes: Mapping[tuple[str, int], dict[str, Any]] | None = None,
    **plan: Any,
) -> Path:
    """A sweep with baseline ``rope``.

    Args:
        folder: Where.
        losses: Validation loss of the finished runs by variant and seed.
        unfinished: Variants and seeds of runs without a result.
        changes: Keys of ``result.json`` that differ, by variant and seed.
        plan: Fields of the plan that differ.
    """
    variants = list(dict.fromkeys([*losses, *(variant for variant, _ in unfinished)]))
    fields = {
        "name": folder.name,
        "question": "Does the imaginary half help?",
        "baseline": "rope",
        "variants": variants,
        "display": {variant: NAMES.get(variant, variant) for variant in variants},
        **plan,
    }
    write_plan(folder, SweepPlan(**fields))
    for variant, own in losses.items():
        for seed, loss in own.items():
            own_changes = (changes or {}).get((variant, seed), {})
            write_run(folder, variant, seed, result(variant, seed, loss, **own_changes))
    for variant, seed in unfinished:
        write_run(folder, variant, seed)
    return folder


def report_rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The table below a heading, by the name in its first column."""
    lines = [line for line in text.split(f"## {heading}")[1].split("\n## ")[0].splitlines() if line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def report_table(folder: Path) -> dict[str, dict[str, str]]:
    """``report.csv`` by variant."""
    with (folder / "report.csv").open() as file:
        return {row["variant"]: row for row in csv.DictReader(file)}
