"""What faults are made of, and what is looked at in folders and processes."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults_tools import Try

LIMIT = 60.0  # seconds of a command, beyond which it hangs
GOOD = ("detected", "recovered")
BAD = ("lost", "silent", "executed", "hangs", "tracebacks", "vague", "litter")
SAID = (*GOOD, *BAD)
CODES = (0, 2, 75, 76, 130, 141)  # see docs/trust.md; `sweep run` has 1 besides
LEFT_BEHIND = re.compile(r"\.partial|\.old-|\.tmp|\.trial|\.lock$")
TRACE = re.compile(r"Traceback \(most recent call last\)|Segmentation fault|terminate called")


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: Exit code, negative for a signal.
        out: Standard output.
        err: Standard error.
        hung: Whether it had to be killed.
    """

    code: int
    out: str = ""
    err: str = ""
    hung: bool = False

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"

    @property
    def last(self) -> str:
        """The last line of standard error, or of what it has said at all."""
        lines = [line for line in (self.err.strip() or self.out.strip()).splitlines() if line]
        return lines[-1][:300] if lines else ""


@dataclass(frozen=True)
class Job:
    """A command and what is to come of it.

    Attributes:
        name: For the table.
        argv: Its arguments, relative to the folder of a try.
        needs: What it reads, of the world's files.
        facts: What it has come to, from the folder and how it ended; equal for equal results.
        made: What it writes to, at the top of the folder.
        code: Exit codes of success.
    """

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]
    facts: Callable[[Path, Done], Any]
    made: str = ""


@dataclass(frozen=True)
class Case:
    """A command before something hostile.

    Attributes:
        argv: Arguments.
        needs: What it reads of the world; ``a->b`` under another name.
        files: More files, names to content; bytes, text or what becomes YAML.
        names: What a refusal has to name.
        refused: Whether it must be refused.
        check: What is wrong with what is left, if anything.
    """

    argv: tuple[str, ...]
    needs: tuple[str, ...] = ()
    files: tuple[tuple[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    refused: bool = True
    check: Callable[[Path], str | None] = lambda folder: None


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        kind: One of kills, damage, signals, disks, hostile, two.
        name: What is done, to what.
        attempt: Does it once.
        most: How many different tries there are, None for no end.
        weight: Its share of its kind's time, relative to other rows.
    """

    kind: str
    name: str
    attempt: Callable[["Try"], None]
    most: int | None = None
    weight: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}"


def left_behind(folder: Path) -> set[str]:
    """Names of temporary files and locks."""
    return {path.name for path in folder.rglob("*") if LEFT_BEHIND.search(path.name)}


def only_order(facts: Any) -> Any:
    """Facts in which steps of TensorBoard are only whether they stand once and in order."""
    if not isinstance(facts, dict):
        return facts
    return {
        key: value == sorted(set(value)) if key == "tensorboard" else only_order(value)
        for key, value in facts.items()
    }


def difference(expected: Any, found: Any, at: str = "") -> str:
    """Where two results differ first."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in expected or key not in found:
                return f"{at}{key} is {'missing' if key in expected else 'new'}"
            if expected[key] != found[key]:
                return difference(expected[key], found[key], f"{at}{key}: ")
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{at}{len(found)} entries instead of {len(expected)}"
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one != other:
                return difference(one, other, f"{at}{number}: ")
    return f"{at}{str(found)[:120]} instead of {str(expected)[:120]}"


def shown(argv: Iterable[str]) -> str:
    return "ropepp " + " ".join(argv)


def inhabitants(folder: Path) -> list[int]:
    """Processes whose working directory is in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            place = os.readlink(process / "cwd")
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and f"{place}{os.sep}".startswith(f"{folder}{os.sep}"):
                found.append(int(process.name))
    return found


def end_inhabitants(folder: Path, wait: float = 0.0) -> bool:
    """Kills them, if after ``wait`` seconds there are any; returns whether there were."""
    end = time.monotonic() + wait
    while (left := inhabitants(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    there = bool(left)
    deadline = time.monotonic() + 10
    while left and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        left = inhabitants(folder)
    return there


def clear(folder: Path) -> None:
    """Removes a folder with all that is in it, read-only or not."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+rwx", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
