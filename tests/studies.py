"""A small study, and what its runs leave behind."""

import json
from pathlib import Path
from typing import Any

import yaml

from study import Study

CONTENT: dict[str, Any] = {
    "name": "toy",
    "prepare": ["sotu", "--out", "data/toy"],
    "base": ["base.yaml"],
    "keys": {"std": "model.network.o_proj.std.gain", "lr": "model.optimizer.lr"},
    "variants": {
        "rope": {"display": "RoPE", "model.position": {"class_path": "RoPE"}},
        "ec": {"model.position": {"class_path": "RoPEppEC"}},
    },
    "parts": {
        "search": {
            "variants": ["rope", "ec"],
            "grid": {"std": [1.0, 0.5], "lr": [1e-3, 2e-3]},
            "seeds": [100],
        },
        "again": {
            "variants": ["rope", "ec"],
            "best": {"of": ["search"], "keep": 2},
            "seeds": [101, 102],
        },
        "final": {
            "variants": ["rope", "ec"],
            "best": {"of": ["search", "again"], "keep": 1},
            "seeds": [0, 1, 2],
        },
        "rule": {
            "variants": ["ec"],
            "best": {"of": ["search", "again"], "keep": 1, "variant": "rope"},
            "cells": {"as-it-is": {}, "smaller": {"std": 0.1}},
            "seeds": [0],
        },
        "both": {
            "variants": ["rope"],
            "cells": {"today": {"lr": 7e-3}},
            "best": {"of": ["search", "again"], "keep": 1},
            "best_cells": {"best": {"trainer.max_steps": 9}},
            "seeds": [0],
        },
    },
}


def write(folder: Path) -> Study:
    file = folder / "configs" / "study" / "toy.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return Study(file)


def finish(study: Study, part: str, row: str, seed: int, loss: float | None) -> None:
    """What a run leaves behind."""
    folder = study.logs / part / row / f"seed-{seed}"
    folder.mkdir(parents=True)
    trial = {"variant": row, "seed": seed, "overrides": {"a": 1}, "settings": {}}
    (folder / "trial.json").write_text(json.dumps(trial))
    lines = [
        {"step": 2, "train/loss": 3.25, "train/grad_norm": 0.5, "other": 1},
        {"step": 4, "train/loss": 3.0, "train/grad_norm": None},
        {"step": 4, "validation/loss": loss},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"validation_loss": loss, "steps": 4, "hyper_parameters": {"much": 1}}
    (folder / "result.json").write_text(json.dumps(result))


def search(study: Study, losses: dict[str, float | None]) -> None:
    for row, loss in losses.items():
        finish(study, "search", row, 100, loss)
    study.collect("search")


LOSSES: dict[str, float | None] = {
    "rope_std-1_lr-0.001": 5.0, "rope_std-1_lr-0.002": 4.0, "rope_std-0.5_lr-0.001": 4.5,
    "rope_std-0.5_lr-0.002": None, "ec_std-1_lr-0.001": 4.3, "ec_std-1_lr-0.002": 4.1,
    "ec_std-0.5_lr-0.001": 4.2, "ec_std-0.5_lr-0.002": 4.4,
}  # fmt: skip
