"""One ``fit`` as a process: claimed, started, watched, asked to end, and adopted from a
driver that is no more.

Two locks, both gone when their holders are, however these end. The driver holds ``lock`` from
before the start until it has written down how the run ended. ``fit.log`` is locked through the very
descriptor that is the standard output of ``fit``: every process below inherits that, those that
launchers start too, and so the lock lives as long as any of them.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from ropepp.errors import Preempted
from ropepp.files import write_json
from ropepp.runs.records import RESULT, Trial
from ropepp.runs.status import LOCK, LOG, OUTCOME, is_locked, last_lines, read_json

PROMPT = "$ "  # before the command in the log, where an attempt begins
LINGERING = 10.0  # seconds that processes may outlive the one that was started
GENTLE = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)  # somebody wanted it
# torchrun ends with 1 whatever its workers end with, and tells theirs in its summary.
TORCHRUN_CODE = re.compile(r"exitcode\s*:\s*(-?\d+)\b")
ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: .+|[\w.]*(Error|Exception)\b.*)")


Point = TypeVar("Point")


@dataclass
class RunProcess(Generic[Point]):
    """A run that this driver cares for.

    Attributes:
        point: What it is run for, such as a point of a sweep.
        trial: What is run.
        directory: Its folder.
        claim: Descriptor of ``lock``, held.
        slot: Which of the driver's slots it takes.
        process: None if another driver has started it.
        furthest: Step of the newest checkpoint when it began.
    """

    point: Point
    trial: Trial
    directory: Path
    claim: int
    slot: int
    process: subprocess.Popen[bytes] | None
    furthest: int
    began: float = field(default_factory=time.monotonic)
    is_pruned: bool = False
    reported: set[int] = field(default_factory=set)  # steps whose evaluation the pruner has seen
    _exited: float | None = None

    @property
    def log(self) -> Path:
        return self.directory / LOG

    def has_ended(self) -> bool:
        """Whether no process of it is left; ends those that linger on without their parent."""
        if self.process is not None and self.process.poll() is None:
            return False
        if not is_locked(self.log):
            return True
        if self.process is not None:
            self._exited = self._exited or time.monotonic()
            waited = time.monotonic() - self._exited
            if waited > LINGERING:
                self.send(signal.SIGTERM if waited < 2 * LINGERING else signal.SIGKILL)
        return False

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process group, or if the one that leads it is gone, or is to be
        killed, to all processes that write to the log."""
        leader = self.process.pid if self.process is not None else self._recorded()
        alive = self.process is not None and self.process.poll() is None
        found = list(writers(self.log))
        if leader is not None and (alive or leader in found):
            signal_group(leader, number)
            if number != signal.SIGKILL:
                return  # a launcher passes it on
        for pid in found:
            signal_process(pid, number)

    def _recorded(self) -> int | None:
        return read_json(self.directory / LOCK).get("pid")

    def outcome(self) -> tuple[str, str]:
        """How it ended, and why: finished, preempted, pruned or failed."""
        if (self.directory / RESULT).exists():
            return "finished", ""
        if self.is_pruned:
            return "pruned", "no better than others at this step"
        code = None if self.process is None else self.process.returncode
        lines = this_attempt(last_lines(self.log))
        codes = {int(found[1]) for line in lines if (found := TORCHRUN_CODE.search(line))}
        if code is None or code == Preempted.code or (code == 1 and Preempted.code in codes):
            return "preempted", "asked to end" if code else "its driver was killed"
        if -code in GENTLE or code - 128 in GENTLE:  # the latter from a shell or a launcher
            return "preempted", f"killed by signal {-code if code < 0 else code - 128}"
        said = next((line for line in reversed(lines) if ERROR.match(line)), None)
        return "failed", f"exit code {code}: {said or (lines or [''])[-1]}"

    def release(self, state: str, reason: str) -> None:
        """Writes down how it ended, and lets go of it."""
        if state != "finished":
            outcome = {"state": state, "reason": reason, "time": time.time()}
            write_json(self.directory / OUTCOME, outcome)
        os.close(self.claim)


def claim(directory: Path) -> int | None:
    """The descriptor of a run's ``lock``, held; None if another driver has it."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def start(
    command: list[str],
    point: Point,
    trial: Trial,
    directory: Path,
    claimed: int,
    slot: int,
    gpus: str | None,
    threads: int | None,
) -> RunProcess[Point] | None:
    """Starts a claimed run; None if processes of an earlier attempt still live."""
    log = os.open(directory / LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (directory / OUTCOME).unlink(missing_ok=True)
        os.write(log, f"\n{PROMPT}{shlex.join(command)}\n".encode())
        environment = dict(os.environ)
        if gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        furthest = newest_step(directory)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,  # Ctrl-C is for the driver, which asks politely
        )  # fmt: skip
    except BlockingIOError:
        return None
    finally:
        os.close(log)
    note = {"host": socket.gethostname(), "pid": process.pid, "driver": os.getpid(), "gpus": gpus}
    os.ftruncate(claimed, 0)
    os.pwrite(claimed, json.dumps(note).encode(), 0)
    return RunProcess(point, trial, directory, claimed, slot, process, furthest)


def this_attempt(lines: list[str]) -> list[str]:
    """What the last attempt has said."""
    said = [line.strip() for line in lines if line.strip()]
    starts = [number for number, line in enumerate(said) if line.startswith(PROMPT)]
    return said[starts[-1] + 1 :] if starts else said


def is_orphan(directory: Path) -> bool:
    """Whether a run of this machine goes on without its driver."""
    note = read_json(directory / LOCK)
    here = note.get("host") == socket.gethostname()
    return here and is_locked(directory / LOG) and not is_locked(directory / LOCK)


def newest_step(directory: Path) -> int:
    """Step of a run's newest checkpoint, 0 without any."""
    names = (path.name for path in (directory / "checkpoints").glob("step-*.ckpt"))
    return max((int(re.sub(r"\D", "", name)) for name in names), default=0)


def writers(log: Path) -> Iterator[int]:
    """Processes of this machine whose output goes to a file; nothing where there is no /proc."""
    target = str(log.resolve())
    for folder in Path("/proc").glob("[0-9]*"):
        for stream in ("1", "2"):
            try:
                if os.readlink(folder / "fd" / stream) == target:
                    yield int(folder.name)
                    break
            except OSError:  # gone, or another user's
                break


def signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def signal_process(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
