"""What docs/results keeps of a study's runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = ("train/loss", "train/grad_norm")  # of the curve


def curve(file: Path) -> dict[str, list[Any]]:
    """Steps and values of a run, compact."""
    out: dict[str, list[Any]] = {"step": [], **{key: [] for key in KEPT}, "validation": []}
    for line in map(json.loads, file.read_text().splitlines()):
        if KEPT[0] in line:
            out["step"].append(line["step"])
            for key in KEPT:
                value = line.get(key)
                out[key].append(None if value is None else float(f"{value:.6g}"))
        if "validation/loss" in line:
            out["validation"].append([line["step"], line["validation/loss"]])
    return out


def curve_lines(found: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The inverse of `curve`, as far as it goes."""
    for number, step in enumerate(found["step"]):
        yield {"step": step} | {key: found[key][number] for key in KEPT}
    for step, loss in found["validation"]:
        yield {"step": step, "validation/loss": loss}


def agree(known: Any, asked: Any) -> bool:
    """Whether a run was made with what is asked; what is known has all defaults besides."""
    if isinstance(known, dict) and isinstance(asked, dict):
        return all(key in known and agree(known[key], own) for key, own in asked.items())
    return bool(known == asked)
