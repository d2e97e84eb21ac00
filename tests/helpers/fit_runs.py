"""Small runs of the command line for tests."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from helpers import warm_python
from helpers.golden_data import REPOSITORY
from ropepp.cli import main

CONFIG = {
    "model.network": {
        "vocab_size": 257,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 48,
    },
    "model.position": "RoPEppEC",
    "model.optimizer.lr": 0.01,
    "data": "CorpusDataModule",
    "data.sequence_length": 32,
    "data.global_batch_size": 8,
    "data.micro_batch_size": 4,
    "data.validate_every_n_steps": 10,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.max_steps": 20,
    "trainer.gradient_clip_val": 1.0,
    "metrics.every_n_steps": 1,
    "checkpoint.every_n_steps": 5,
}


def arguments(corpus: Path, logs: Path, run: str, **changes: Any) -> list[str]:
    """The arguments of a small ``fit``; ``changes`` use ``__`` for dots."""
    values = dict(CONFIG)
    values["data.corpus"] = str(corpus)
    values["logs"], values["run"] = str(logs), run
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    if "config" in values:  # what comes later wins
        values = {"config": values.pop("config"), **values}
    flags = [
        f"--{key}={json.dumps(value) if isinstance(value, dict | list | bool) else value}"
        for key, value in values.items()
        if value is not None
    ]
    return ["fit", *flags]


def fit(corpus: Path, logs: Path, run: str, **changes: Any) -> Path:
    """Runs a small ``fit`` in this process; returns its folder."""
    assert main([*arguments(corpus, logs, run, **changes), "--debug"]) == 0
    return logs / "default" / run


def start(
    corpus: Path,
    logs: Path,
    run: str,
    script: Path | None = None,
    python: str | None = None,
    **changes: Any,
) -> subprocess.Popen[str]:
    """Starts the same in a process group of its own, by another script than the command line's if
    one is given, and in a warm process unless a ``python`` is given."""
    program = ["-m", "ropepp.cli"] if script is None else [str(script)]
    python = python or warm_python.python()
    return subprocess.Popen(
        [python, *program, *arguments(corpus, logs, run, **changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, seconds: int = 240) -> str:
    """Waits for a process; checks its exit code and returns what it printed."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, out
    return out


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, seconds: int = 120) -> None:
    """Waits until the run has logged ``step``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(line["step"] >= step for line in metrics(run)):
            return
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {step}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's ``metrics.jsonl``."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(run: Path) -> list[dict[str, Any]]:
    """The same without the speed, which no two runs share."""
    return [
        {key: value for key, value in line.items() if not key.startswith("utilisation/")}
        for line in metrics(run)
    ]
