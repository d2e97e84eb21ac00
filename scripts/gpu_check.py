#!/usr/bin/env python3
"""What a GPU does with this project, in a time that is known before.

    python scripts/gpu_check.py --seconds 290 --out DIR

runs from a source tree with torch, lightning and numpy, without installing anything, in stages that
each have a share of the time: ceilings of the card, parity of every attention backend, their speed
and that of the loss, training steps of the 376M model, its decoding, the 776M model, flex. DIR gets
figures.jsonl, one figure a line as it is found, gpu.md, the table that is printed at the end, and
profile.txt, the kernels that take longest in a training step.

The measuring happens in another process, which is ended where one measurement hangs; what comes
after it is measured all the same. `--rehearse` runs everything on a CPU at toy size.
"""

import argparse
import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_table

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
STAGES = ("ceilings", "parity", "speed", "376m", "decode", "776m", "flex")
RESERVE = 5.0  # seconds before the end at which whatever still runs is ended
GRACE, LEAST = 0.15, 20.0  # of all the time, and seconds: how long a stage may be outlasted
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "src"), str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Progress:
    """How far the worker has come.

    Args:
        figures: All that was found.
        status: Of each stage, in words.
        stage: The present one.
        case: Number of the present measurement in it.
        name: Its name.
        until: When the present stage should be over.
        errors: What went wrong in each stage.
        seconds: How long each stage took.
    """

    figures: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    case: int = -1
    name: str = ""
    until: float = 0.0
    errors: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _noted: float = field(default_factory=time.time)

    def note(self, line: dict[str, Any]) -> None:
        """Takes in what the worker says."""
        event, stage, now = line["event"], line["stage"], time.time()
        if event != "stage":
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._noted
        self._noted = now
        if event == "stage":
            self.stage, self.case, self.until = stage, -1, line["until"]
            self.status.setdefault(stage, "running")
        elif event == "case":
            self.case, self.name = line["number"], line["case"]
        elif event in ("figure", "error"):
            self.figures.append({key: value for key, value in line.items() if key != "event"})
            if event == "error":
                self.fail(stage, f"{line['case']}: {line['value']}")
        elif self.status[stage] == "running":
            cut = f", cut after {line['done']} of {line['cases']}" if event == "cut" else ""
            self.status[stage] = f"ok{cut}"

    def fail(self, stage: str, why: str) -> None:
        self.errors.setdefault(stage, []).append(why[:200])
        first, *others = self.errors[stage]
        self.status[stage] = f"failed: {first}" + f" and {len(others)} more" * bool(others)

    def finish(self, stages: list[str]) -> None:
        """Says what became of stages that did not end."""
        for stage in stages:
            status = self.status.get(stage)
            if status in (None, "running"):
                self.status[stage] = "not reached" if status is None else "ok, cut by the end"
        self.status = {stage: self.status[stage] for stage in stages}


class Worker:
    """The process that measures, and a thread that reads what it says."""

    def __init__(self, options: argparse.Namespace, stages: list[str], skip: int) -> None:
        given = {
            "until": options.until,
            "out": str(options.out),
            "rehearse": options.rehearse,
            "stages": stages,
            "skip": skip,
        }
        environment = {**os.environ, **ENVIRONMENT}
        if options.rehearse:
            # At toy size threads wait for each other longer than they work.
            one = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
            environment |= {**dict.fromkeys(one, "1"), "CUDA_VISIBLE_DEVICES": ""}
        self.lines: queue.Queue[str | None] = queue.Queue()
        with open(options.out / "log.txt", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "gpu_worker.py"), json.dumps(given)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def end(self, patience: float = 0.0) -> int:
        """Ends it and whatever it has started, if it does not end by itself in some seconds;
        returns its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time
            self.process.wait(2.0)
        return -signal.SIGKILL if self.process.returncode is None else self.process.returncode


def measure(options: argparse.Namespace, save: Callable[[Progress], object]) -> Progress:
    """Runs workers until all stages are over or the time is up."""
    progress, rest, skip = Progress(), list(options.stages), 0
    grace = max(LEAST, GRACE * options.seconds)
    while rest and time.time() < options.until:
        progress.stage, progress.case, progress.name = rest[0], skip - 1, "start"
        progress.until = options.until
        worker, reason = Worker(options, rest, skip), "interrupted"
        try:
            reason = follow(worker, progress, options, grace, save)
        finally:
            code = worker.end(0.0 if reason else 3.0)
        if not reason and code == 0:
            break
        reason = reason or f"the process ended with code {code}"
        progress.fail(progress.stage, f"{progress.name}: {reason}")
        print(f"{progress.stage}, {progress.name}: {reason}", flush=True)
        # Where no measurement was reached, the next process would end there too.
        rest = rest[rest.index(progress.stage) :]
        reached = progress.case >= skip
        rest, skip = (rest, progress.case + 1) if reached else (rest[1:], 0)
    return progress


def follow(
    worker: Worker,
    progress: Progress,
    options: argparse.Namespace,
    grace: float,
    save: Callable[[Progress], object],
) -> str:
    """Takes in what a worker says until it ends; returns why it must be ended, if it must."""
    while True:
        try:
            line = worker.lines.get(timeout=0.3)
        except queue.Empty:
            # What it has left running may keep the pipe open.
            line = "" if worker.process.poll() is None else None
        if line is None:
            return ""
        if line:
            found = json.loads(line)
            progress.note(found)
            say(found)
            if found["event"] in ("figure", "error"):
                with open(options.out / "figures.jsonl", "a") as file:
                    file.write(json.dumps(progress.figures[-1]) + "\n")
            elif found["event"] in ("end", "cut"):
                save(progress)
        if time.time() > min(options.until + RESERVE / 2, progress.until + grace):
            return f"ended {time.time() - progress.until:.0f} s after the stage's time"


def say(line: dict[str, Any]) -> None:
    """A line for people who watch."""
    if line["event"] == "stage":
        print(f"== {line['stage']}: {line['until'] - time.time():.0f} s", flush=True)
    elif line["event"] == "case":
        print(f"-- {line['case']}", flush=True)
    elif line["event"] in ("figure", "error"):
        print(f"   {line['name']}: {gpu_table.text(line)}", flush=True)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, before anything is imported or installed."""
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        # Containers may have a GPU without its tool.
        return any(Path("/dev").glob("nvidia[0-9]*"))
    return "GPU" in listed.stdout


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=290, help="after which the table is there (290)")
    add("--out", type=Path, default=ROOT / "logs" / "gpu_check", help="folder (logs/gpu_check)")
    add("--stages", nargs="+", choices=(*STAGES, "fit"), default=list(STAGES))
    add("--fit", action="store_true", help="then train a small model by the command line, FSDP2")
    add("--commit", help="of the source, where git cannot say it")
    add("--rehearse", action="store_true", help="on a CPU, at toy size")
    options = parser.parse_args(arguments)
    order = (*STAGES, "fit")
    wanted = {*options.stages, *(["fit"] if options.fit else [])}
    options.stages = [name for name in order if name in wanted]
    options.until = time.time() + options.seconds - RESERVE
    return options


def main() -> None:
    options = parse()
    if not options.rehearse and not has_gpu():
        print("gpu_check needs a CUDA GPU; this machine has none", file=sys.stderr)
        sys.exit(2)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("figures.jsonl", "log.txt"):
        (options.out / name).write_text("")
    command = shlex.join(["python", "scripts/gpu_check.py", *sys.argv[1:]])
    commit = options.commit or gpu_table.commit(ROOT)

    def save(progress: Progress) -> str:
        found = (progress.status, progress.figures, progress.seconds)
        page = gpu_table.page(command, commit, *found)
        (options.out / "gpu.md").write_text(page)
        return page

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the worker too
    progress = measure(options, save)
    progress.finish(options.stages)
    print(save(progress), flush=True)
    # A rehearsal is to find errors in all of them.
    allowed = ("ok",) if options.rehearse else ("ok", "not reached")
    ends = progress.status.values()
    states = {said if options.rehearse else said.partition(",")[0] for said in ends}
    sys.exit(0 if states <= set(allowed) else 1)


if __name__ == "__main__":
    main()
