"""Kills and losses of power: then the same command must come to the undisturbed
result."""

import contextlib
import json
import os
import random
import subprocess
from pathlib import Path

from faults_parts import Done, Fault, Job, end_inhabitants
from faults_tools import Try
from faults_world import (
    EVALUATE,
    EXPORTED,
    LONGER,
    PIPED,
    PREPARED,
    REPLACED,
    SHARDED,
    SWEPT,
    WRITERS,
)


def faults() -> list[Fault]:
    """The rows."""
    rows = []
    for job in WRITERS:
        rows += [
            Fault("kills", f"{job.name}, at a call", lambda one, job=job: at_a_call(one, job)),
            Fault("kills", f"{job.name}, power lost", lambda one, job=job: power_lost(one, job)),
        ]
    for job in (PREPARED, REPLACED, LONGER, SHARDED, EVALUATE, SWEPT, PIPED, EXPORTED):
        name = f"{job.name}, at any time, up to three times"
        rows.append(Fault("kills", name, lambda one, job=job: at_any_time(one, job)))
    return rows


def point(one: Try, calls: int) -> int:
    """The call of a try: all of them in a random order that the seed decides."""
    number = one.random.randrange(1, calls + 1)  # for later rounds
    if one.index >= calls:
        return number
    order = random.Random(f"{one.bench.seed}/{one.key}").sample(range(1, calls + 1), calls)
    return order[one.index]


def at_a_call(one: Try, job: Job) -> None:
    """Killed before a call that changes files, or in the middle of a write; then again."""
    _, _, calls = one.bench.expected(job)
    one.copy(*job.needs)
    at, how = point(one, calls), ("kill", "torn")[one.index % 2]
    done = one.run(job.argv, at=at, how=how)
    one.notes.append(f"{how} at {at} of {calls}")
    unless_done(one, job, done)


def power_lost(one: Try, job: Job) -> None:
    """The same, and what was never synced is gone."""
    _, _, calls = one.bench.expected(job)
    one.copy(*job.needs)
    before = {path: stamp(path) for path in one.folder.rglob("*") if path.is_file()}
    journal, at = one.side / "journal", point(one, calls)
    journal.touch()
    one.variables["FAULTS_OF_CHILDREN"] = json.dumps({"journal": str(journal)})
    one.run(job.argv, at=at, how="kill", journal=str(journal))
    end_inhabitants(one.folder)
    one.variables.clear()
    lost = lose(one.folder, journal, before)
    one.notes.append(f"power lost at {at} of {calls}; cut: {', '.join(lost)[:200]}")
    one.compare(job, one.run(job.argv), power_lost=True)


def stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def lose(folder: Path, journal: Path, before: dict[Path, tuple[int, int, int]]) -> list[str]:
    """Cuts every file that is new or changed to what was last synced of it; their names."""
    synced: dict[int, int] = {}
    for line in journal.read_text().splitlines():
        _, inode, size = map(int, line.split())
        synced[inode] = size
    known = {inode: size for inode, size, _ in before.values()}
    cut = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.is_symlink() or before.get(path) == stamp(path):
            continue
        inode, size, _ = stamp(path)
        safe = synced.get(inode, known.get(inode, 0))
        if size > safe:
            os.truncate(path, safe)
            cut.append(str(path.relative_to(folder)))
    return cut


def at_any_time(one: Try, job: Job) -> None:
    """All processes are killed at a random moment, once to three times."""
    _, seconds, _ = one.bench.expected(job)
    one.copy(*job.needs)
    for _ in range(one.random.choice((1, 1, 2, 3))):
        wait = one.random.uniform(0.05, 1.1 * seconds)
        process = one.start(job.argv)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        process.kill()
        process.wait()
        end_inhabitants(one.folder)
        one.notes.append(f"killed after {wait:.2f} s")
        if process.returncode == 0:
            one.notes.append("it had ended before")
            return one.compare(job, Done(0))
    return one.compare(job, one.run(job.argv))


def unless_done(one: Try, job: Job, done: Done) -> None:
    """The same command again, as after a kill."""
    if done.code == 0:
        one.notes.append("it ended before")
        return one.compare(job, done)
    if done.code > 0 and not done.hung:
        one.count("tracebacks", f"exit code {done.code} of a killed process: {done.last}")
    return one.compare(job, one.run(job.argv))
