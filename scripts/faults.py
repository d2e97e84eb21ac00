"""Tries all kinds of faults and counts what was lost. Run by scripts/faults.

Every try is decided by the seed, the fault's name and its number, and can be repeated alone with
``--again 'KIND: NAME/NUMBER'``, which shows what the command said and keeps the folder. What has
been tried is kept in the folder of work: a call that was killed goes on there, unless the commit,
the seed or the choice of kinds is another.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import faults_damage
import faults_disks
import faults_hostile
import faults_kills
import faults_page
import faults_signals
import faults_two
import faults_world
from faults_parts import BAD, Fault
from faults_tools import Bench, Try
from ropepp.runs.machine import commit, device_name

ROOT = Path(__file__).resolve().parent.parent
# How the seconds are shared between the kinds.
SHARES = {
    "kills": 0.34,
    "damage": 0.24,
    "hostile": 0.16,
    "disks": 0.12,
    "signals": 0.08,
    "two": 0.06,
}
SECONDS = 600.0


def all_faults() -> list[Fault]:
    """All rows of the table."""
    return [
        *faults_kills.faults(),
        *faults_disks.faults(),
        *faults_signals.faults(),
        *faults_damage.faults(),
        *faults_hostile.faults(),
        *faults_two.faults(),
    ]


class Schedule:
    """Hands out tries: the row next that has had the least time for its share of it.

    Args:
        faults: The rows.
        each: So many tries of each row and no more; None goes by time.
        deadline: When nothing new is begun, of `time.monotonic`.
        done: Tries that are done already.
    """

    def __init__(
        self, faults: list[Fault], each: int | None, deadline: float, done: list[dict[str, Any]]
    ) -> None:
        self.faults, self.each, self.deadline = faults, each, deadline
        self.lock = threading.Lock()
        whole: Counter[str] = Counter()
        for fault in faults:
            whole[fault.kind] += fault.weight  # type: ignore[assignment]
        self.weight = {f.key: SHARES[f.kind] * f.weight / whole[f.kind] for f in faults}
        self.begun: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()
        for one in done:
            self.begun[one["fault"]] = max(self.begun[one["fault"]], one["index"] + 1)
            self.spent[one["fault"]] += one["seconds"]

    def next(self) -> tuple[Fault, int] | None:
        """A row and the number of the try, None when all is done."""
        with self.lock:
            left = [fault for fault in self.faults if self.begun[fault.key] < self._most(fault)]
            if not left or time.monotonic() > self.deadline:
                return None
            fault = min(left, key=lambda one: (self.begun[one.key] > 0, self._used(one)))
            self.begun[fault.key] += 1
            self.spent[fault.key] += 1.0  # until it is known
            return fault, self.begun[fault.key] - 1

    def took(self, fault: Fault, seconds: float) -> None:
        with self.lock:
            self.spent[fault.key] += seconds - 1.0

    def _used(self, fault: Fault) -> float:
        return self.spent[fault.key] / self.weight[fault.key]

    def _most(self, fault: Fault) -> float:
        bounds = [float(n) for n in (fault.most, self.each) if n is not None]
        return min(bounds, default=float("inf"))


def attempt(bench: Bench, fault: Fault, index: int, keep: bool = False) -> dict[str, Any]:
    """Does one try; what came of it."""
    began = time.monotonic()
    one = Try(bench, fault.key, index, keep)
    try:
        with one:
            fault.attempt(one)
    except Exception as error:  # of ours: the row must not look better for it
        one.count("lost", f"{type(error).__name__} of scripts/faults: {error}")
    said = [name for name in one.said if name != "recovered" or not one.said & {"lost", "silent"}]
    seconds = round(time.monotonic() - began, 2)
    return {
        "fault": fault.key,
        "index": index,
        "said": sorted(said),
        "notes": one.notes,
        "seconds": seconds,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(
    bench: Bench, schedule: Schedule, store: Path, done: list[dict[str, Any]], jobs: int, end: float
) -> None:
    """Tries until the time is over or nothing is left; each try is written down at once."""
    lock, shown = threading.Lock(), [time.monotonic()]

    def work() -> None:
        while (chosen := schedule.next()) is not None:
            fault, index = chosen
            record = attempt(bench, fault, index)
            schedule.took(fault, record["seconds"])
            with lock:
                done.append(record)
                with store.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                bad = [name for name in record["said"] if name in BAD]
                if bad:
                    what = "; ".join(record["notes"])[:300]
                    say(f"{', '.join(bad)}: {fault.key}/{index}: {what}")
                if time.monotonic() - shown[0] > 15:
                    shown[0] = time.monotonic()
                    left = max(0.0, end - time.monotonic()) / 60
                    failed = sum(bool({*one["said"]} & {*BAD}) for one in done)
                    say(f"{len(done)} tries, {failed} not well, {left:.1f} min left")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for _ in range(jobs)]:
            future.result()


def begin(folder: Path, header: dict[str, Any], alone: bool) -> list[dict[str, Any]]:
    """The tries of an earlier call with the same header; of another one all is removed, and the
    header is written. For a try ``alone`` the commit must be the same."""
    store = folder / "tries.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # a kill can tear the last line
            continue
    if found and (found[0] == header or (alone and found[0]["commit"] == header["commit"])):
        return found[1:]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store.write_text(json.dumps(header) + "\n")
    return []


def again(bench: Bench, name: str) -> int:
    """Repeats one try and shows all about it."""
    key, _, index = name.rpartition("/")
    fault = next((one for one in all_faults() if one.key == key), None)
    if fault is None or not index.isdigit():
        sys.exit(f"there is no {name!r}; such as 'kills: fit, at a call/3'")
    record = attempt(bench, fault, int(index), keep=True)
    one = Try(bench, key, int(index))
    for file in sorted((one.outer / "side").glob("*-[0-9]*")):
        print(f"--- {file.name}\n{file.read_text(errors='replace')}")
    print(json.dumps(record, indent=2), f"\nkept in {one.folder}")
    return int(bool({*record["said"]} & {*BAD}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help=f"for all of it ({SECONDS:.0f})")
    add("--each", type=int, help="so many tries of each row, and no more")
    add(
        "--only",
        nargs="+",
        metavar="KIND",
        help=f"of {', '.join(faults_page.KINDS)}, or part of a name",
    )
    add("--seed", type=int, default=0, help="another one tries others (0)")
    cores = os.cpu_count() or 1
    add("--jobs", type=int, default=cores, help=f"tries at a time ({cores})")
    add("--work", type=Path, default=ROOT / "logs" / "faults", help="folder (logs/faults)")
    add("--out", type=Path, help="the page (docs/faults.md, or of a part faults.md in the folder)")
    add("--again", metavar="FAULT", help="repeat this try and show it")
    add("--list", action="store_true", help="show the rows")
    options = parser.parse_args(argv)
    faults = [
        one
        for one in all_faults()
        if not options.only or any(w == one.kind or w in one.key for w in options.only)
    ]
    if not faults:
        parser.error(
            f"--only is {options.only}; allowed: {', '.join(faults_page.KINDS)}, parts of names"
        )
    if options.list:
        print("\n".join(fault.key for fault in faults))
        return 0
    header = {"commit": commit(), "seed": options.seed, "only": options.only, "each": options.each}
    began = time.monotonic()
    done = begin(options.work, header, alone=options.again is not None)
    with Bench(options.work, options.seed, faults_world.provide) as bench:
        if options.again:
            return again(bench, options.again)
        before = sum(one["seconds"] for one in done) / max(1, options.jobs)
        end = began + max(0.0, options.seconds - before)
        schedule = Schedule(faults, options.each, end, done)
        left = f"{max(0.0, end - time.monotonic()) / 60:.1f} min"
        say(f"{len(faults)} rows, {len(done)} tries are done, {left} left; all in {options.work}")
        run(bench, schedule, options.work / "tries.jsonl", done, options.jobs, end)
    words = ["scripts/faults", *(sys.argv[1:] if argv is None else argv)]
    about = {
        "command": " ".join(words),
        "commit": header["commit"],
        "machine": machine(),
        "torch": version("torch"),
        "seconds": round(before + time.monotonic() - began, 1),
        "seed": options.seed,
    }
    done.sort(key=lambda one: (one["fault"], one["index"]))
    part = options.only or options.each
    out = options.out or (options.work if part else ROOT / "docs") / "faults.md"
    print(faults_page.write(out, done, faults, about))
    return int(any({*one["said"]} & {*BAD} for one in done))


def machine() -> str:
    """What the page says of it."""
    return f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, Linux {os.uname().release}"


if __name__ == "__main__":
    sys.exit(main())
