"""Disks that are full, small, read-only or in the way: one line says so, and after the cause is
gone the same command comes to the undisturbed result."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults_parts import Done, Fault, Job, end_inhabitants
from faults_tools import Try
from faults_world import REPLACED, WRITERS

ERRORS = ("ENOSPC", "EIO", "EDQUOT")
TMPFS = (64, 96, 128, 192, 256, 384, 512, 768)  # KiB


def faults() -> list[Fault]:
    """The rows; each goes through the commands."""
    kinds: tuple[tuple[str, Callable[[Try, Job, int], None], int | None, int], ...] = (
        ("writes that fail: ENOSPC, EIO, EDQUOT", fails, None, 3),
        ("limits of file sizes and descriptors", limits, None, 2),
        ("a file, or a folder, in the way", in_the_way, 1, 1),
        ("standard output full, or nobody reads it", unheard, 2, 1),
        ("a small disk, or one that is read-only", small_disk, len(TMPFS) + 1, 1),
    )
    rows = []
    for name, what, most, weight in kinds:
        jobs = [job for job in WRITERS if job is not REPLACED or what is not in_the_way]

        def attempt(one: Try, what: Any = what, jobs: list[Job] = jobs) -> None:
            job = jobs[one.index % len(jobs)]
            one.notes.append(job.name)
            what(one, job, one.index // len(jobs))

        rows.append(Fault("disks", name, attempt, most and most * len(jobs), weight))
    return rows


def refused(one: Try, job: Job, done: Done) -> bool:
    """Whether a command has said in one line that it cannot go on, or else has done its work."""
    if done.code == 0:
        return False
    inputs = [Path(name).name for name in job.needs]
    if one.names(done, [job.made, *inputs, str(one.folder)]):
        one.count("detected", done.last)
    return True


def then_again(one: Try, job: Job, done: Done) -> None:
    """After the cause is gone the same command comes to the result; without a word of it, the first
    one must have."""
    if refused(one, job, done):
        one.compare(job, one.run(job.argv))
    elif done.code == 0:
        one.compare(job, done)
        if "lost" in one.said:
            one.said.remove("lost")
            one.count("silent")


def fails(one: Try, job: Job, number: int) -> None:
    """From a call on, every write meets an error of the disk."""
    _, _, calls = one.bench.expected(job)
    one.copy(*job.needs)
    at, how = one.random.randrange(1, calls + 1), ERRORS[number % len(ERRORS)]
    one.notes.append(f"{how} from {at} of {calls} on")
    then_again(one, job, one.run(job.argv, at=at, how=how))


def limits(one: Try, job: Job, number: int) -> None:
    """Files may only be so large, or only so many be open."""
    one.copy(*job.needs)
    name = ("FSIZE", "NOFILE")[number % 2]
    value = {"FSIZE": int(10 ** one.random.uniform(1.5, 5)), "NOFILE": one.random.randrange(8, 48)}
    one.notes.append(f"{name} {value[name]}")
    then_again(one, job, one.run(job.argv, limits={name: value[name]}))


def in_the_way(one: Try, job: Job, number: int) -> None:
    """A file stands where a folder belongs, or the other way round."""
    one.copy(*job.needs)
    place = one.folder / job.made
    if "." in job.made:
        place.mkdir()
    else:
        place.write_text("in the way\n")
    done = one.run(job.argv)
    if done.code == 0:
        return one.count("silent", f"it ended with 0 although {job.made} was in the way")
    if one.names(done, [job.made]):
        one.count("detected", done.last)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return one.compare(job, one.run(job.argv))


def unheard(one: Try, job: Job, number: int) -> None:
    """Standard output is a full disk, or a pipe that nobody reads from."""
    one.copy(*job.needs)
    if number % 2:
        read, write = os.pipe()
        os.close(read)
        done = one.finish(one.start(job.argv, stdout=write))
        os.close(write)
    else:
        with open("/dev/full", "wb") as full:
            done = one.finish(one.start(job.argv, stdout=full))
    one.compare(job, one.run(job.argv) if done.code or job.made == "logs" else done)
    if done.code not in (0, 1, 2, 75, 141):
        one.count("tracebacks", f"exit code {done.code}: {done.last}")


def small_disk(one: Try, job: Job, number: int) -> None:
    """A file system in memory that is too small at first, or cannot be written."""
    size = f"size={TMPFS[number % len(TMPFS)]}k"
    if not mount(one.folder, size):
        return one.notes.append("not permitted here")
    try:
        read_only = number == len(TMPFS)
        if read_only:
            subprocess.run(["mount", "-o", "remount,size=100m", str(one.folder)], check=True)
        try:
            one.copy(*job.needs)
        except OSError:
            return one.notes.append("too small for what the command reads")
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(one.folder)], check=True)
        done = one.run(job.argv)
        one.notes.append("read-only" if read_only else size)
        subprocess.run(["mount", "-o", "remount,rw,size=100m", str(one.folder)], check=True)
        then_again(one, job, done)
    finally:
        end_inhabitants(one.folder)
        subprocess.run(["umount", "-l", str(one.folder)], check=False)
    return None


def mount(folder: Path, size: str) -> bool:
    """Mounts a file system in memory, where that is permitted."""
    if sys.platform != "linux" or os.getuid() or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
