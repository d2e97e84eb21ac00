"""One ``fit`` as a process: claimed, started, watched, asked to end, and adopted from a
driver that is no more.

Two locks, both gone when their holders are, however these end. The driver holds ``lock`` from
before the start until it has written down how the run ended. ``fit.log`` is locked through the very
descriptor that is the standard output of ``fit``: every process below inherits that, those that
launchers start too, and so the lock lives as long as any of them.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ropepp.errors import Preempted
from ropepp.files import disk_errors, lock, write_json
from ropepp.records import Damaged
from ropepp.runs.records import load_json, read_result
from ropepp.runs.status import LOCK, LOG, OUTCOME, TAIL, is_locked, list_checkpoints

POLL = 0.3  # seconds
GRACE = 300.0  # seconds that runs have to write a checkpoint when they are asked to end
PROMPT = "$ "  # before the command in the log, where an attempt begins
LINGERING = 10.0  # seconds that processes may outlive the one that was started
# Ask a driver to end; not those that it was started to ignore, as by nohup.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GENTLE = (*STOP_SIGNALS, signal.SIGKILL)  # somebody wanted it
# torchrun ends with 1 whatever its workers end with, and tells theirs in its summary.
TORCHRUN_CODE = re.compile(r"exitcode\s*:\s*(-?\d+)\b")
ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: .+|[\w.]*(Error|Exception)\b.*)")


@dataclass
class RunProcess:
    """A run that this driver cares for, in its folder."""

    directory: Path
    claim: int  # the descriptor of ``lock``, held
    process: subprocess.Popen[bytes] | None  # None if another driver has started it
    furthest: int  # step of the newest checkpoint when it began
    began: float = field(default_factory=time.monotonic)
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
        recorded = starter(self.directory).get("pid")
        leader = self.process.pid if self.process is not None else recorded
        alive = self.process is not None and self.process.poll() is None
        found = list(writers(self.log))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if leader is not None and (alive or leader in found):
                os.killpg(leader, number)
                if number != signal.SIGKILL:
                    return  # a launcher passes it on
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def outcome(self) -> tuple[str, str]:
        """How it ended, and why: finished, preempted or failed."""
        if read_result(self.directory):
            return "finished", ""
        code = None if self.process is None else self.process.returncode
        lines = last_words(self.log)
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
            write_outcome(self.directory, state, reason)
        os.close(self.claim)


class StopRequest:
    """Within its block, takes note of being asked to end, and answers the first Ctrl-C; in the main
    thread alone, elsewhere nothing is noticed."""

    def __init__(self, answer: bytes = b"") -> None:
        self.made, self._answer = False, answer
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        main = threading.current_thread() is threading.main_thread()
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        numbers = wanted if main else ()
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.made:
            with contextlib.suppress(OSError):
                os.write(2, self._answer)
        self.made = True


def claim(directory: Path) -> int | None:
    """The descriptor of a run's ``lock``, held; None if another driver has it."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    if lock(descriptor, directory / LOCK):
        return descriptor
    os.close(descriptor)
    return None


def adopt(directory: Path, claimed: int) -> RunProcess | None:
    """A claimed run that goes on here without the driver that started it; None if none does."""
    here = socket.gethostname()
    if not is_locked(directory / LOG) or starter(directory).get("host", here) != here:
        return None
    return RunProcess(directory, claimed, None, newest_step(directory))


def start(
    command: list[str],
    directory: Path,
    claimed: int,
    gpus: str | None = None,
    threads: int | None = None,
) -> RunProcess | None:
    """Starts a claimed run; None if processes of an earlier attempt still live."""
    with (directory / LOG).open("ab", buffering=0) as log:
        if not lock(log.fileno(), directory / LOG):
            return None
        (directory / OUTCOME).unlink(missing_ok=True)
        with disk_errors(directory / LOG):
            log.write(f"\n{PROMPT}{shlex.join(command)}\n".encode())
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
    note = {"host": socket.gethostname(), "pid": process.pid, "driver": os.getpid(), "gpus": gpus}
    with disk_errors(directory / LOCK):
        os.ftruncate(claimed, 0)
        os.pwrite(claimed, json.dumps(note).encode(), 0)
    return RunProcess(directory, claimed, process, furthest)


def end_all(runs: Sequence[RunProcess], grace: float = GRACE) -> None:
    """Asks runs to end, and waits until they have; after ``grace`` seconds they are killed."""
    for run in runs:
        run.send(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while left := [run for run in runs if not run.has_ended()]:
        if time.monotonic() > deadline:
            for run in left:
                run.send(signal.SIGKILL)
        time.sleep(POLL)


def write_outcome(directory: Path, state: str, reason: str) -> None:
    """Writes down how an attempt without a result ended."""
    write_json(directory / OUTCOME, {"state": state, "reason": reason, "time": time.time()})


def last_words(log: Path) -> list[str]:
    """What the last attempt has said at its end; a progress bar's states are lines of their own."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    said = [line.strip() for line in lines if line.strip()]
    starts = [number for number, line in enumerate(said) if line.startswith(PROMPT)]
    return said[starts[-1] + 1 :] if starts else said


def starter(directory: Path) -> dict[str, Any]:
    """Who has started a run, and where: host, pid, driver, gpus; empty while nobody has."""
    try:
        return load_json(directory / LOCK)
    except Damaged:  # claimed, and not yet started
        return {}


def is_orphan(directory: Path) -> bool:
    """Whether a run of this machine goes on without its driver."""
    note = starter(directory)
    here = note.get("host") == socket.gethostname()
    return here and is_locked(directory / LOG) and not is_locked(directory / LOCK)


def newest_step(directory: Path) -> int:
    """Step of a run's newest checkpoint, 0 without any."""
    found = list_checkpoints(directory / "checkpoints")
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def writers(log: Path) -> Iterator[int]:
    """Processes of this machine whose output goes to a file; nothing where there is no /proc."""
    target = str(log.resolve())
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            if target in (os.readlink(folder / "fd" / stream) for stream in ("1", "2")):
                yield int(folder.name)
