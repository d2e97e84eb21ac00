"""A command of ours to whose process something happens; started by scripts/faults.

    python scripts/faults_child.py '{"at": 17, "how": "kill"}' prepare text --out corpus

What can be asked for, all optional:

    count       file to which the number of calls that change files is written at the end
    at, how     at the N-th such call: kill, torn (half of a write, then a kill), or the name of an
                error (ENOSPC, EIO) that this and every later write meets
    journal     file to which each synced file is noted, so that a loss of power can be played
    ignore      numbers of signals that were inherited as ignored
    terminal    whether standard input becomes the controlling terminal
    limits      of `resource`, by name: {"FSIZE": 1000}
    nobody      whether root's rights are given up
    memory      bytes that may be used besides what the process has at its start

Calls that change files are those of Python's own interface below the working directory: opening for
writing, every write of a file object, rename, unlink, mkdir, fsync and so on. What libraries write
without it (torch, zstd) is met between them, and by kills at any time.
"""

import builtins
import errno
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
FUNCTIONS = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Calls:
    """Counts calls and lets the fault happen.

    Args:
        at: Number of the call, from 1 on; 0 for none.
        how: What happens there.
        journal: Where synced files are noted.
    """

    def __init__(self, at: int, how: str, journal: str | None) -> None:
        self.at, self.how = at, how
        self.number = 0
        self.inside = False
        self.folder = os.getcwd() + os.sep
        self.process = os.getpid()
        self.journal = journal and os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def concerns(self, path: Any) -> bool:
        """Whether a path, relative ones included, is one of ours."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def happens(self, writes: bool) -> bool:
        """Counts a call; True if half of what it writes is to be written and all ends then.

        Raises:
            OSError: The disk is full from here on.
        """
        if os.getpid() != self.process:  # a fork has counters of its own, and none of the faults
            return False
        self.number += 1
        if not self.at or self.number < self.at:
            return False
        if self.how in ("kill", "torn"):
            if self.how == "torn" and writes:
                return True
            self.die()
        if writes:
            code = getattr(errno, self.how)
            raise OSError(code, os.strerror(code))
        return False

    @staticmethod
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """A hook of the interpreter, before the call is made."""
        if self.inside or (event != "open" and event not in EVENTS):
            return
        self.inside = True
        try:
            if event == "open" and not (args[2] & WRITES):
                return
            if any(self.concerns(path) for path in args[:2]):
                self.happens(writes=event == "open")
        finally:
            self.inside = False

    def wrap(self, name: str) -> None:
        """Counts a function of `os` that takes a descriptor."""
        real, writes = getattr(os, name), "write" in name

        def counted(descriptor: Any, *args: Any) -> Any:
            if self.inside or not self.concerns(place_of(descriptor)):
                return real(descriptor, *args)
            if self.happens(writes):
                self.die()
            found = real(descriptor, *args)
            if name in ("fsync", "fdatasync"):
                self.note(descriptor)
            return found

        setattr(os, name, counted)

    def note(self, descriptor: Any) -> None:
        """Writes down a file whose content the disk has."""
        if self.journal:
            stat = os.fstat(descriptor)
            line = f"{stat.st_dev} {stat.st_ino} {stat.st_size}\n"
            REAL_WRITE(self.journal, line.encode())

    def open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
             errors: str | None = None, newline: str | None = None, closefd: bool = True,
             opener: Any = None) -> Any:  # fmt: skip
        """`open` whose file object counts its writes."""
        if not {*mode} & {*"wax+"} or not self.concerns(file):
            return REAL_OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = CountedFile(file, mode.replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
        buffer = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
        if "b" in mode:
            return buffer
        text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text


class CountedFile(io.FileIO):
    """A file whose every write is a call."""

    def write(self, data: Any) -> int:
        assert CALLS is not None
        if not CALLS.inside and CALLS.happens(writes=True):
            whole = memoryview(data).cast("B")
            super().write(whole[: len(whole) // 2])
            CALLS.die()
        return super().write(data)


REAL_OPEN, REAL_WRITE = io.open, os.write
CALLS: Calls | None = None


def place_of(descriptor: Any) -> str | None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return None


def set_up(asked: dict[str, Any]) -> None:
    """What happens before the command begins."""
    global CALLS
    for number in asked.get("ignore", ()):
        signal.signal(number, signal.SIG_IGN)
    if asked.get("terminal"):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for name, value in asked.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if "memory" in asked:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + asked["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if asked.get("nobody") and os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    if {"at", "count", "journal"} & asked.keys():
        CALLS = Calls(asked.get("at", 0), asked.get("how", "kill"), asked.get("journal"))
        for name in FUNCTIONS:
            CALLS.wrap(name)
        io.open = builtins.open = CALLS.open  # type: ignore[assignment]
        sys.addaudithook(CALLS.audit)


def main() -> int:
    asked = json.loads(sys.argv[1])
    sys.argv = ["ropepp", *sys.argv[2:]]
    set_up(asked)
    from ropepp.cli import main as run

    try:
        return run()
    finally:
        if "count" in asked and CALLS is not None:
            CALLS.inside = True
            Path(asked["count"]).write_text(str(CALLS.number))


if __name__ == "__main__":
    sys.exit(main())
