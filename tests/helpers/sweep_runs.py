"""Small sweeps: of the real ``fit``, and of a stand-in that takes a moment."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import warm_python
from helpers.fit_runs import CONFIG
from helpers.golden_data import REPOSITORY
from ropepp.commands.sweep import main
from ropepp.errors import Preempted
from ropepp.sweep.config import load
from ropepp.sweep.study import open_sweep

# Behaves like `fit` towards a driver. What a run does besides its steps stands in the folder of
# logs, in behaviour.json: run to a dictionary.
STAND_IN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
logs, seed = Path(flags["logs"]), int(flags["seed_everything"])
run = logs / flags["experiment"] / flags["run"]
behaviour = json.loads((logs / "behaviour.json").read_text()).get(flags["run"], {})
asked = []
if not behaviour.get("stubborn"):
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with (run / "starts").open("a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
    file.write(json.dumps({"pid": os.getpid(), "gpu": gpu, "time": time.time()}) + chr(10))
if behaviour.get("helper"):  # a process in a session of its own, such as a launcher's worker
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(run / "checkpoints").mkdir(exist_ok=True)
saved = [int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.ckpt")]
steps, rate = behaviour.get("steps", 3), float(flags.get("model.optimizer.lr", 0.01))
loss = 1.0 + abs(rate - 0.01) + seed / 1000
for step in range(max(saved, default=0) + 1, steps + 1):
    time.sleep(behaviour.get("pause", 0.02))
    if step == behaviour.get("crash"):
        print("warming up"); print("ValueError: it broke", file=sys.stderr); sys.exit(1)
    if step == behaviour.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    line = {"step": step, "train/loss": loss, "validation/loss": loss, "train/tokens": 256.0 * step,
            "utilisation/tokens_per_second": 512.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + chr(10))
    if step % 2 == 0 or asked:
        (run / "checkpoints" / f"step-{step:07d}.ckpt").touch()
    if asked:
        sys.exit(75)
result = {"validation_loss": loss, "steps": steps, "seed": seed}
(run / "result.json").write_text(json.dumps(result))
"""


class Sweeps:
    """Writes sweeps into a folder and runs them."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.stand_in = folder / "stand_in.py"
        self.stand_in.write_text(STAND_IN)
        self.behave({})
        self.drivers: list[subprocess.Popen[str]] = []
        values = {key: value for key, value in CONFIG.items() if key != "model.position"}
        values |= {"data.corpus": str(corpus), "data": None, "model.optimizer": None}
        self.base(values)

    def base(self, values: dict[str, Any]) -> Path:
        """Writes base.yaml from flat keys."""
        content: dict[str, Any] = {
            "data": {"class_path": "CorpusDataModule", "init_args": {}},
            "model": {"optimizer": {"class_path": "AdamW", "init_args": {}}},
        }
        for key, value in values.items():
            if key in ("data", "model.optimizer"):
                continue
            *parts, last = key.split(".")
            at = content
            for part in parts:
                at = at.setdefault(part, {})
                at = at["init_args"] if "class_path" in at else at
            at[last] = value
        file = self.folder / "base.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    def write(self, real: bool = False, **changes: Any) -> Path:
        """Writes sweep.yaml with these keys; of the stand-in unless ``real``; ... leaves a key
        out."""
        content: dict[str, Any] = {
            "name": "try",
            "question": "Does it work?",
            "base": ["base.yaml"],
            "variants": {
                "rope": {"model.position": {"class_path": "RoPE"}},
                "ec": {"model.position": {"class_path": "RoPEppEC"}},
            },
            "seeds": [0, 1],
            "logs": str(self.logs),
        }
        if not real:
            content["launcher"] = f"{sys.executable} {self.stand_in} {{args}}"
        content |= changes
        file = self.folder / "sweep.yaml"
        given = {key: value for key, value in content.items() if value is not ...}
        file.write_text(yaml.safe_dump(given, sort_keys=False))
        return file

    def behave(self, runs: dict[str, dict[str, Any]]) -> None:
        """What the stand-in does, by run."""
        (self.logs / "behaviour.json").write_text(json.dumps(runs))

    def run(self, *args: str, code: int = 0) -> None:
        """Drives the sweep in this process; runs of the real fit are warm ones."""
        words = ["run", str(self.folder / "sweep.yaml"), *args]
        with warm_python.everywhere():
            if not code:
                main(words)
                return
            with pytest.raises((SystemExit, Preempted)) as end:
                main(words)
            assert end.value.code == code

    def drive(
        self, *args: str, init: bool = True, python: str | None = None
    ) -> subprocess.Popen[str]:
        """Starts a driver in a process of its own, which writes no report; ``init`` saves it the
        checks. It and its runs of the real fit are warm ones unless a ``python`` is given."""
        if init:
            open_sweep(load(self.folder / "sweep.yaml"))
        code = (
            "import sys; from ropepp import cli; from ropepp.commands import sweep; "
            "sweep._write_report = lambda folder: print('reported', folder); "
            "sys.exit(cli.main(['sweep', *sys.argv[1:]]))"
        )
        python = python or warm_python.python()
        driver = subprocess.Popen(
            [
                python or warm_python.python(),
                "-c",
                code,
                "run",
                str(self.folder / "sweep.yaml"),
                *args,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self.drivers.append(driver)
        return driver

    def directory(self, run: str) -> Path:
        return self.logs / "try" / run

    def states(self) -> list[str]:
        """States of all trials."""
        study = open_sweep(load(self.folder / "sweep.yaml"))
        return [study.state_of(trial) for trial in study.trials()]

    def starts(self, run: str) -> list[dict[str, Any]]:
        """How often the stand-in was started for a run, and where."""
        file = self.directory(run) / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def outcome(self, run: str) -> dict[str, Any]:
        return json.loads((self.directory(run) / "outcome.json").read_text())

    def finished(self) -> list[str]:
        """Runs with a result."""
        root = self.logs / "try"
        return sorted(str(f.parent.relative_to(root)) for f in root.rglob("result.json"))


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def finish(driver: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == code, out
    return out
