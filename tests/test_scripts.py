"""Scripts: the batch script under a SLURM that only takes notes and the commands in the page that
explains it; a side of a benchmark."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.golden_data import REPOSITORY
from ropepp.cli import main
from ropepp.train.estimate import plan_run

SCRIPT = REPOSITORY / "scripts" / "slurm.sbatch"
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "ec",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "8",
}


def submit(folder: Path, code: int) -> tuple[int, dict[str, list[str]]]:
    """Runs the script, with an ``srun`` that ends with ``code``; returns its own exit code and the
    arguments of what it called."""
    (folder / "bin").mkdir()
    (folder / "bin" / "activate").touch()
    for name, ends_with in (("srun", code), ("scontrol", 0)):
        program = folder / "bin" / name
        program.write_text(
            f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {folder}/{name}\nexit {ends_with}\n"
        )
        program.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, **SLURM, "PATH": path, "ROPEPP_VENV": str(folder)}
    command = ["bash", str(SCRIPT), "--model.position", "configs/position/ec.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
    notes = [folder / name for name in ("srun", "scontrol") if (folder / name).exists()]
    return done.returncode, {note.name: note.read_text().split("\0")[:-1] for note in notes}


@pytest.mark.parametrize("code", [0, 2, 75, 76, 137])
def test_slurm_repeats_a_run_that_was_asked_to_end(tmp_path: Path, code: int) -> None:
    found, calls = submit(tmp_path, code)
    assert found == code
    assert calls.get("scontrol") == (["requeue", "17"] if code == 75 else None)


def test_slurm_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    monkeypatch.chdir(REPOSITORY)
    _, calls = submit(tmp_path, 0)
    begin = calls["srun"].index("ropepp")
    assert calls["srun"][begin + 1] == "fit"
    plan = plan_run(calls["srun"][begin + 2 :])
    assert (plan.processes.total, plan.processes.shards, plan.accumulation) == (16, 8, 1)
    assert type(plan.module.network.position).__name__ == "RoPEppEC"


def documented() -> list[list[str]]:
    """Arguments of every ``ropepp`` in the page's blocks."""
    found, inside = [], False
    text = (REPOSITORY / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            words = shlex.split(line)
            begin = next((i for i, word in enumerate(words) if word.startswith("ropepp")), None)
            found += [words[begin + 1 :]] if begin is not None else []
    return found


def test_documented_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    commands = documented()
    assert {"fit", "estimate", "checkpoint"} <= {command[0] for command in commands}
    for command in commands:
        if command[0] == "fit":
            devices = None if "--trainer.devices" in command else 8  # `auto` in the configuration
            assert plan_run(command[1:], devices).processes.strategy == "fsdp2"
        elif command[0] == "checkpoint":
            assert main(command) == 2  # there is none, and everything else is right
        else:
            assert main(command) == 0


@pytest.mark.parametrize("side", ["RoPE", "transformers", "bare"])
def test_a_side_of_the_bench_steps_when_told(side: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    sizes |= {"num_kv_heads": 2, "ffn_size": 48}
    command = [sys.executable, "scripts/peer.py", "--side", side, "--sizes", json.dumps(sizes)]
    command += ["--rows", "2", "--length", "8", "--dtype", "bfloat16"]
    done = subprocess.run(
        command, cwd=REPOSITORY, input="1\n3\n", capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(answer["seconds"]) for answer in answers] == [1, 3]
    assert all(seconds > 0 for answer in answers for seconds in answer["seconds"])
    assert answers[1]["peak"] >= answers[0]["peak"] > 2**20
