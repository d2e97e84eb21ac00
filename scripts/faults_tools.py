"""What all faults are tried with: a warm server of processes, a folder for each try, and the
judgement of what a command has said and left."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import warm
from faults_parts import (
    BAD,
    CODES,
    LIMIT,
    TRACE,
    Done,
    Job,
    clear,
    difference,
    end_inhabitants,
    left_behind,
    only_order,
    shown,
)

SCRIPTS = Path(__file__).resolve().parent
CHILD = SCRIPTS / "faults_child.py"
MODULES = (  # what commands import as they go
    "omegaconf.grammar_parser",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.format_utils",
    "ropepp.eval.evaluate",
    "ropepp.interop.export",
    "ropepp.pipeline",
    "ropepp.sweep.runner",
    "ropepp.sweep.boards",
    "ropepp.sweep.report",
)
# Stands for ``python`` in all that is started; to the `fit`s of sweeps and pipelines may happen
# what the environment says.
SHIM = """#!{python} -S
import os, sys
sys.path.insert(0, {scripts!r})
import warm
arguments = [one for one in sys.argv[1:] if one not in ("-B", "-u", "-S", "-s", "-E", "-I")]
asked = os.environ.get("FAULTS_OF_CHILDREN")
if asked and arguments[:2] == ["-m", "ropepp.cli"]:
    arguments = [{child!r}, asked, *arguments[2:]]
sys.exit(warm.run({socket!r}, arguments, __file__))
"""


class Bench:
    """Folders, the warm server, and the undisturbed results.

    Args:
        folder: Where all happens; kept for the next call.
        seed: Of all that is drawn.
        provide: Makes what is named in the world.
    """

    def __init__(self, folder: Path, seed: int, provide: Callable[["Bench", str], None]) -> None:
        self.folder, self.seed = folder.resolve(), seed
        self.world = self.folder / "world"
        self._provide, self._making = provide, threading.RLock()
        self.world.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{name: value for name, value in os.environ.items() if "ROPEPP" not in name},
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "Agg",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._expected: dict[str, tuple[Any, float, int]] = {}
        self.left: dict[str, set[str]] = {}  # names of files that belong there undisturbed
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self.python = str(self.folder / "python")

    def __enter__(self) -> "Bench":
        socket = f"/tmp/ropepp-faults-{os.getpid()}"
        Path(self.python).write_text(
            SHIM.format(
                python=sys.executable, scripts=str(SCRIPTS), child=str(CHILD), socket=socket
            )
        )
        Path(self.python).chmod(0o755)
        command = [sys.executable, warm.__file__, "serve", "--attached", socket, *MODULES]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, env=self.environment)
        while not os.path.exists(socket):
            if self._server.poll() is not None:
                sys.exit("the server of warm processes has not begun")
            time.sleep(0.02)
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()

    def provide(self, name: str) -> None:
        """Makes a part of the world, unless it is there."""
        with self._making:
            self._provide(self, name)

    def expected(self, job: Job) -> tuple[Any, float, int]:
        """What undisturbed comes of a job, its seconds, and its calls that change files.

        Raises:
            RuntimeError: Undisturbed it fails.
        """
        with self._lock:
            lock = self._locks.setdefault(job.name, threading.Lock())
        with lock:
            if job.name not in self._expected:
                count = self.folder / ("count-" + re.sub(r"\W", "-", job.name))
                one = Try(self, f"undisturbed-{job.name}", 0)
                with one:
                    one.copy(*job.needs)
                    began = time.monotonic()
                    done = one.run(job.argv, count=str(count))
                    seconds = time.monotonic() - began
                    if done.code != 0:
                        raise RuntimeError(f"undisturbed, {job.name} fails: {done.text[-2000:]}")
                    facts = job.facts(one.folder, done)
                    self.left[job.name] = left_behind(one.folder)
                self._expected[job.name] = facts, seconds, int(count.read_text())
                count.unlink()
        return self._expected[job.name]


@dataclass
class Try:
    """One fault, once, in a folder of its own: ``outer/in``, with nothing but this beside it.

    Attributes:
        said: What is to be counted, of `SAID`.
        note: What went wrong, or how it was told.
    """

    bench: Bench
    key: str
    index: int
    keep: bool = False
    said: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.variables: dict[str, str] = {}
        self._said: dict[int, tuple[int, list[subprocess.Popen[bytes]]]] = {}
        self.random = random.Random(f"{self.bench.seed}/{self.key}/{self.index}")
        name = re.sub(r"\W+", "-", self.key)[:60]
        self.outer = self.bench.folder / "tries" / f"{name}-{self.index}"
        self.folder = self.outer / "in"
        self.canary = self.bench.folder / f"canary-{name}-{self.index}"

    def __enter__(self) -> "Try":
        clear(self.outer)
        self.canary.unlink(missing_ok=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        if end_inhabitants(self.folder, wait=0.0 if error[0] else 5.0):
            self.count("hangs", "processes are left that nobody waits for")
        if self.canary.exists():
            self.count("executed", "the payload ran")
            self.canary.unlink()
        beside = [
            path.name for path in self.outer.iterdir() if path not in (self.folder, self.side)
        ]
        if beside:
            self.count("executed", f"written outside: {', '.join(beside)}")
        if not self.keep:
            clear(self.outer)

    @property
    def side(self) -> Path:
        """A folder for what belongs to the try and not to the command."""
        side = self.outer / "side"
        side.mkdir(exist_ok=True)
        return side

    def count(self, what: str, note: str = "") -> None:
        """Counts the try under ``what``."""
        self.said.add(what)
        if note:
            self.notes.append(f"{what}: {note}" if what in BAD else note)

    def copy(self, *names: str) -> None:
        """Copies files and folders of the world, with their times; ``a->b`` under another name."""
        for name in names:
            old, _, new = name.partition("->")
            self.bench.provide(old)
            source, target = self.bench.world / old, self.folder / (new or old)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)

    def start(
        self, argv: Sequence[str], python: str | None = None, stdout: Any = None, **asked: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a command of ours; ``asked`` is for `faults_child`."""
        number = sum(1 for _ in self.side.glob("out-*"))
        out = stdout if stdout is not None else (self.side / f"out-{number}").open("wb")
        err = stdout if asked.get("terminal") else (self.side / f"err-{number}").open("wb")
        opened = [file for file in {out, err} if file is not stdout]
        pipes = {}
        if "FSIZE" in asked.get("limits", {}):  # which is not meant for what the command says
            pipes = {f: subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=f) for f in opened}
            out, err = (pipes[f].stdin if f in pipes else f for f in (out, err))
        process = subprocess.Popen(
            [python or self.bench.python, str(CHILD), json.dumps(asked), *argv],
            stdin=out if asked.get("terminal") else subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=self.folder,
            env={**self.bench.environment, **self.variables, "FAULTS_CANARY": str(self.canary)},
            start_new_session=True,
        )
        self._said[process.pid] = number, list(pipes.values())
        for file in (*opened, *(cat.stdin for cat in pipes.values())):
            file.close()
        return process

    def finish(self, process: subprocess.Popen[bytes], seconds: float = LIMIT) -> Done:
        """Waits for a command, and judges the way in which it ended: no hang, no traceback, an exit
        code that is documented or the signal that was sent."""
        hung = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            hung = True
            end_inhabitants(self.folder)
            process.kill()
            process.wait()
        texts = []
        number, cats = self._said[process.pid]
        for cat in cats:
            with contextlib.suppress(subprocess.TimeoutExpired):
                cat.wait(5)
        for name in ("out", "err"):
            file = self.side / f"{name}-{number}"
            texts.append(file.read_text(errors="replace") if file.exists() else "")
        done = Done(process.returncode, *texts, hung)
        if hung:
            self.count("hangs", f"over {seconds:.0f} s: {done.last}")
        elif TRACE.search(done.text):
            self.count("tracebacks", done.last)
        return done

    def run(self, argv: Sequence[str], seconds: float = LIMIT, **asked: Any) -> Done:
        """Runs a command of ours, see `start` and `finish`; its code must be a documented one."""
        done = self.finish(self.start(argv, **asked), seconds)
        expected = (*CODES, *((1,) if argv[0] == "sweep" else ()))
        if asked.get("how", "kill") in ("kill", "torn") and asked.get("at"):
            expected += (-signal.SIGKILL,)
        if not done.hung and done.code not in expected:
            self.count("tracebacks", f"exit code {done.code}: {done.last}")
        return done

    def names(self, done: Done, names: Iterable[str]) -> bool:
        """Whether a refusal is one line that names one of these; counted as vague if not."""
        errors = [line for line in done.err.splitlines() if "error: " in line]
        if not errors or errors[-1] != (done.err.strip().splitlines() or [""])[-1]:
            self.count("vague", f"exit code {done.code} without a last line of error: {done.last}")
        elif not any(name in errors[-1] for name in names):
            self.count("vague", f"names nothing: {errors[-1][:300]}")
        else:
            return True
        return False

    def compare(self, job: Job, done: Done, power_lost: bool = False) -> None:
        """Counts the try as recovered if a job has come to what it comes to undisturbed, and as
        lost otherwise. TensorBoard's events may lack steps where power was lost: metrics.jsonl
        has them."""
        expected, _, _ = self.bench.expected(job)
        if done.code == 2 and f"{job.made} exists" in done.last:
            # A kill in the last moment, when all had been said and done; is it the result?
            self.count("detected", done.last)
        elif done.code != 0:
            return self.count("lost", f"{shown(job.argv)} ends with {done.code}: {done.last}")
        try:
            facts = job.facts(self.folder, done)
        except Exception as error:  # whatever cannot be read
            return self.count("lost", f"{type(error).__name__} in what is left: {error}")
        if power_lost:
            expected, facts = only_order(expected), only_order(facts)
        if facts != expected:
            return self.count("lost", difference(expected, facts))
        self.count("recovered")
        found = left_behind(self.folder) - self.bench.left[job.name]
        if found:
            self.count("litter", ", ".join(sorted(found)))
        return None
