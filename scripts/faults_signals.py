"""Signals and terminals: what is asked to end saves, ends in time, and goes on."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults_parts import Fault, Job, end_inhabitants
from faults_tools import Try
from faults_world import EVALUATE, EXPORTED, FITTED, LONGER, PIPED, PREPARED, SWEPT


def faults() -> list[Fault]:
    rows = []
    for name, numbers in SIGNALS.items():
        rows.append(
            Fault("signals", f"fit, {name}", lambda one, n=numbers: signalled(one, LONGER, n))
        )
    for job in (PREPARED, EVALUATE, SWEPT, PIPED, EXPORTED):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        name = f"{job.name}, TERM, INT or HUP"
        rows.append(
            Fault(
                "signals",
                name,
                lambda one, job=job, n=numbers: signalled(one, job, (one.random.choice(n),)),
            )
        )
    rows += [
        Fault("signals", "fit, HUP under nohup", nohup, 20),
        Fault("signals", "fit, its terminal is closed", terminal_closed),
        Fault("signals", "fit of two processes, ended while it starts", orphans, 6),
    ]
    return rows


SIGNALS = {
    "TERM": (signal.SIGTERM,),
    "TERM twice": (signal.SIGTERM, signal.SIGTERM),
    "INT": (signal.SIGINT,),
    "INT twice": (signal.SIGINT, signal.SIGINT),
    "HUP": (signal.SIGHUP,),
    "USR1": (signal.SIGUSR1,),
}


def signalled(one: Try, job: Job, numbers: tuple[signal.Signals, ...]) -> None:
    """Signals at a random moment; a training run must save, and all go on."""
    _, seconds, _ = one.bench.expected(job)
    one.copy(*job.needs)
    process = one.start(job.argv)
    wait = one.random.uniform(0.1, seconds)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    metrics = one.folder / "logs" / "t" / "new" / "metrics.jsonl"
    trains = metrics.exists()
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        time.sleep(one.random.uniform(0, 0.1))
    done = one.finish(process)
    one.notes.append(f"after {wait:.2f} s of {seconds:.2f}, ends with {done.code}")
    own = {-n for n in numbers} if not trains or job is not LONGER else set()
    if not done.hung and done.code not in {0, 75, 130, 141, *own}:
        one.count("tracebacks", f"exit code {done.code}: {done.last}")
    if job is LONGER and done.code == 75:
        saved_present_step(one, metrics)
    one.compare(job, one.run(job.argv))


def saved_present_step(one: Try, metrics: Path) -> None:
    """A run that ended with 75 has a checkpoint of its last step."""
    steps = [int(path.name[5:-5]) for path in (metrics.parent / "checkpoints").glob("step-*.ckpt")]
    logged = [line for line in metrics.read_text().splitlines() if "train/loss" in line]
    if max(steps, default=0) < len(logged):
        one.count("lost", f"{len(logged)} steps are done and {max(steps, default=0)} are saved")
    else:
        one.count("detected")


def nohup(one: Try) -> None:
    """SIGHUP was inherited as ignored: the run goes on to its end."""
    one.copy(*LONGER.needs)
    _, seconds, _ = one.bench.expected(LONGER)
    process = one.start(LONGER.argv, ignore=[signal.SIGHUP])
    time.sleep(one.random.uniform(0.1, seconds))
    process.send_signal(signal.SIGHUP)
    one.compare(LONGER, one.finish(process))


def terminal_closed(one: Try) -> None:
    """The terminal, from which it reads and to which it writes, is gone, and with it the session's
    leader is told: it saves and ends, and goes on."""
    import pty

    one.copy(*LONGER.needs)
    _, seconds, _ = one.bench.expected(LONGER)
    master, slave = pty.openpty()
    process = one.start(LONGER.argv, stdout=slave, terminal=True)
    os.close(slave)
    deadline = time.monotonic() + one.random.uniform(0.1, seconds)
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):
                os.read(master, 4096)
    os.close(master)
    done = one.finish(process)
    one.notes.append(f"ends with {done.code}")
    if not done.hung and done.code not in (0, 75, 130, -signal.SIGHUP):
        one.count("tracebacks", f"exit code {done.code}")
    if done.code == 75:
        saved_present_step(one, one.folder / "logs" / "t" / "new" / "metrics.jsonl")
    one.compare(LONGER, one.run(LONGER.argv))


def orphans(one: Try) -> None:
    """The first of two processes, in interpreters of their own, is killed or asked to end within
    its first seconds: no other stays."""
    one.copy(*FITTED.needs)
    argv = (*FITTED.argv, "--trainer.strategy=fsdp2", "--trainer.devices=2",
            "--data.micro_batch_size=1", "--trainer.max_steps=100000")  # fmt: skip
    process = one.start(argv, python=sys.executable)
    time.sleep(one.random.uniform(0.5, 14.0))
    number = (signal.SIGKILL, signal.SIGTERM)[one.index % 2]
    process.send_signal(number)
    one.notes.append(f"{number.name}")
    one.finish(process)
    if end_inhabitants(one.folder, wait=10.0):
        one.count("hangs", "an orphan is there after 10 seconds")
    else:
        one.count("recovered")
