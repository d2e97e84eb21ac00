"""Folders of runs and sweeps with any content: what tells of them says so in one line, or tells."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.any_values import MANY, VALUES, accepted_or_refused, changed
from ropepp.runs.status import status, table
from ropepp.runs.table import results
from ropepp.sweep.report import write_report

PLAN = {"name": "s", "question": "Why?", "baseline": "rope", "variants": ["rope", "ec"]}
RESULT: dict[str, Any] = {
    "variant": "RoPE", "seed": 0, "steps": 3, "skipped_steps": 0, "tokens": 96, "parameters": 7,
    "kv_cache_bytes_per_token": 2, "training_flops_per_token": 1.0, "sequence_length": 8,
    "train_loss": 2.0, "validation_loss": 2.0, "validation_perplexity": 7.4,
    "evaluation": {"validation/loss": 2.0},
    "loss_by_position": {"": {"position": [1], "loss": [2.0]}},
    "tokens_per_second": 3.0, "seconds": 1.0, "peak_memory_bytes": 4, "device": "here",
    "world_size": 1, "hyper_parameters": {"network": {"num_layers": 1}}, "finished": "2026",
    "torch": "2", "commit": "x",
}  # fmt: skip
FILES = ("trial.json", "result.json", "metrics.jsonl", "outcome.json", "lock")


def write_sweep(folder: Path) -> None:
    """Two finished runs."""
    shutil.rmtree(folder, ignore_errors=True)
    for variant in ("rope", "ec"):
        run = folder / variant / "seed-0"
        run.mkdir(parents=True)
        trial = {"variant": variant, "seed": 0, "overrides": {}, "settings": {"position": variant}}
        line = {"step": 1, "train/loss": 3.0, "train/tokens": 32.0}
        contents = {"trial.json": trial, "result.json": RESULT, "metrics.jsonl": line}
        for name, content in contents.items():
            (run / name).write_text(json.dumps(content) + "\n")
    (folder / "sweep.json").write_text(json.dumps(PLAN))


def damage(folder: Path, data: st.DataObject) -> None:
    """One file has any content."""
    names = ["sweep.json", *(f"rope/seed-0/{name}" for name in FILES)]
    file = folder / data.draw(st.sampled_from(names))
    old = json.loads(file.read_text()) if file.exists() else {}
    text = data.draw(
        st.one_of(
            st.binary(max_size=20),
            VALUES.map(lambda value: json.dumps(value).encode()),
            st.builds(lambda: json.dumps(changed(old, data.draw)).encode()),
        )
    )
    file.write_bytes(text + b"\n" * data.draw(st.integers(0, 1)))


@given(data=st.data())
@settings(MANY, max_examples=80)
def test_status_and_results(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_sweep(folder)
    damage(folder, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with accepted_or_refused():
            text = table(folder, status(folder))
            assert "ec" in text  # the run that nothing happened to
        with accepted_or_refused():
            assert "/seed-0 |" in results([str(folder)])


@given(data=st.data())
@settings(MANY, max_examples=20)
def test_report(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_sweep(folder)
    damage(folder, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with accepted_or_refused():
            files = write_report(folder)
            assert any("ec" in file.read_text() for file in files if file.suffix == ".md")
