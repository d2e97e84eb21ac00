"""What docs/results keeps of a study's runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.runs.records import read_lines

KEPT = ("train/loss", "train/grad_norm")  # of the curve
Key = tuple[str, str, int]  # part, row, seed


def read_records(file: Path) -> dict[Key, dict[str, Any]]:
    """The runs of a study's file, none if there is none; an `InputError` that names the line which
    is no run, or is another one's."""
    found: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
        try:
            record = json.loads(line)
            key = (record["part"], record["row"], record["trial"]["seed"])
            record["trial"]["overrides"], record["result"]["validation_loss"]
            for name in ("step", *KEPT, "validation"):
                list(record["curve"][name])
        except (KeyError, TypeError, ValueError) as error:
            words = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{file}, line {number} is no run ({words}): remove it, or take the file from git"
            ) from error
        if key in found:
            raise InputError(f"{file}, line {number} is {', '.join(map(str, key))} once more")
        found[key] = record
    return found


def curve(file: Path) -> dict[str, list[Any]]:
    """Steps and values of a run, compact."""
    out: dict[str, list[Any]] = {"step": [], **{key: [] for key in KEPT}, "validation": []}
    for line in read_lines(file):
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
