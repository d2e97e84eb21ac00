"""``ropepp sweep run``: drives the runs of a sweep, several at a time, until nothing is left.

The run directories say what is done, their locks who does what (see `ropepp.runs.process`), so that
any number of drivers may work on one sweep, and each may be killed at any time.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ropepp.errors import InputError, Preempted
from ropepp.files import write_json
from ropepp.runs import process
from ropepp.runs.process import RunProcess
from ropepp.runs.records import RESULT, Trial
from ropepp.runs.settings import LAUNCHER, overlay
from ropepp.runs.status import LOCK, LOG, OUTCOME, duration, is_locked, read_json
from ropepp.sweep.spec import CORPUS
from ropepp.sweep.study import Point, Sweep, intermediate, mean

Fit = RunProcess[Point]

POLL = 0.3  # seconds
GRACE = 300.0  # seconds that runs have to write a checkpoint when they are asked to end
REREAD = 10.0  # seconds between looks for points that other drivers have drawn
MOST_KILLS = 3  # in a row without a new checkpoint; then it is the run's fault
ASKED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Driver:
    """Runs what is left of a sweep.

    Args:
        sweep: The sweep.
        gpus: One entry for each run at a time: a device, or None to leave the choice to ``fit``.
        retry_failed: Whether to try again what has failed before.
        limit: Most runs to start.
        grace: Seconds between asking runs to end and killing them.
    """

    def __init__(
        self,
        sweep: Sweep,
        gpus: list[str | None],
        retry_failed: bool = False,
        limit: int | None = None,
        grace: float = GRACE,
    ) -> None:
        self.sweep, self.spec, self.gpus, self.grace = sweep, sweep.spec, gpus, grace
        self.left = limit
        self.running: list[Fit] = []
        self.points = sweep.points()
        self.settled: dict[str, str] = {}  # by point: complete, failed or pruned
        self.all_drawn = not self.spec.search
        self.kills: Counter[str] = Counter()
        self.seconds: list[float] = []  # of runs that finished here
        self.asked = False
        self.broken: InputError | None = None  # why no more runs can be started
        self.elsewhere: set[str] = set()  # runs that other drivers have
        self.reread = time.monotonic()
        everywhere = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if everywhere else os.cpu_count() or 1
        share = len(gpus) > 1 and gpus[0] is None
        self.threads = max(1, cores // len(gpus)) if share else None
        if retry_failed:
            self.forget_failures()

    def run(self) -> None:
        """Returns when nothing is left that could be done here.

        Raises:
            Preempted: The driver was asked to end; its runs have been, too.
            InputError: The configuration is not what it was, or the corpus is missing.
        """
        with self.signals():
            while not self.asked:
                self.look_after()
                while self.may_begin() and self.begin():
                    pass
                if not self.running and (self.broken or not self.elsewhere):
                    break
                time.sleep(POLL)
            if self.asked:
                self.end_all()
        if self.broken:
            raise self.broken

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do for anybody."""
        return self.all_drawn and all(self.next_of(point) is None for point in self.points)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Takes note of being asked to end, where that is possible."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.ask) for number in ASKED_BY}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def look_after(self) -> None:
        """Takes note of runs that have ended, and ends those that the pruner gives up."""
        for fit in list(self.running):
            if fit.has_ended():
                self.settle(fit)
            elif self.spec.pruner != "none" and fit.point.is_drawn and not fit.is_pruned:
                self.prune(fit)
        if self.spec.search and time.monotonic() - self.reread > REREAD:
            self.points, self.reread = self.sweep.points(), time.monotonic()

    # What to do next

    def may_begin(self) -> bool:
        return len(self.running) < len(self.gpus) and not self.asked and not self.broken

    def begin(self) -> bool:
        """Starts or adopts a run, or draws a point; returns whether there was something to do."""
        before, self.elsewhere = self.elsewhere, set()
        mine = {fit.trial.run for fit in self.running}
        pairs = [(point, self.next_of(point)) for point in self.points]
        todo = [(point, run) for point, run in pairs if run is not None and run.run not in mine]
        todo.sort(key=lambda pair: self.kills[pair[1].run])  # what was killed comes last
        # Orphans first: they take room already.
        for point, run in todo:
            if process.is_orphan(self.sweep.directory(run)) and self.take(point, run):
                return True
        for point, run in todo:
            if self.left == 0 or self.broken:
                return False
            if self.take(point, run):
                return True
            self.elsewhere.add(run.run)
        if self.left == 0 or self.broken:
            return False
        if not self.all_drawn and self.draw():
            return True
        if not self.running and self.elsewhere != before and self.elsewhere:
            self.say(f"waiting for {', '.join(sorted(self.elsewhere))}, which other drivers have")
        return False

    def draw(self) -> bool:
        """Looks for points that are not known here; returns whether there are any."""
        known = len(self.points)
        self.all_drawn = not self.sweep.draw()
        self.points = self.sweep.points()
        return not self.all_drawn or len(self.points) > known

    def next_of(self, point: Point) -> Trial | None:
        """The run that a point needs next, None if it is complete, failed or pruned."""
        if point.key in self.settled:
            return None
        for run in point.runs:
            directory = self.sweep.directory(run)
            if (directory / RESULT).exists():
                continue
            state = read_json(directory / OUTCOME).get("state")
            if state in ("failed", "pruned"):
                self.close(point, state)
                return None
            return run
        self.close(point, "complete")
        return None

    def close(self, point: Point, state: str) -> None:
        """Notes that nothing is left to do for a point."""
        self.settled[point.key] = state
        if state == "complete":
            self.sweep.mark(point, "COMPLETE", mean([self.value(run) for run in point.runs]))
            return
        self.sweep.mark(point, "FAIL" if state == "failed" else "PRUNED")
        for directory in map(self.sweep.directory, point.runs):
            if not (directory / RESULT).exists() and not (directory / OUTCOME).exists():
                outcome = {"state": state, "reason": "another seed of it was", "time": time.time()}
                write_json(directory / OUTCOME, outcome)

    def value(self, run: Trial) -> float:
        try:
            found = self.sweep.metric(run)
        except InputError as error:
            self.broken, found = error, None
        return float("nan") if found is None else found

    # A run

    def take(self, point: Point, run: Trial) -> bool:
        """Claims a run and starts it, or adopts what another driver has started; returns whether
        something has changed."""
        directory = self.sweep.directory(run)
        claim = process.claim(directory)
        if claim is None:
            return False
        ended = read_json(directory / OUTCOME).get("state") in ("failed", "pruned")
        if ended or (directory / RESULT).exists():  # in the meantime, by another driver
            os.close(claim)
            return True
        free = sorted(set(range(len(self.gpus))) - {fit.slot for fit in self.running})
        if is_locked(directory / LOG):
            step, gpu = process.newest_step(directory), read_json(directory / LOCK).get("gpus")
            slot = next((n for n in free if self.gpus[n] == gpu), free[0])
            fit: Fit | None = RunProcess(point, run, directory, claim, slot, None, step)
            self.say(f"{run.run} goes on without its driver: adopted")
        else:
            fit = self.start(point, run, claim, free[0])
        if fit is None:
            os.close(claim)
            return False
        self.running.append(fit)
        self.sweep.mark(point, "RUNNING")
        return True

    def start(self, point: Point, run: Trial, claim: int, slot: int) -> Fit | None:
        try:
            self.check_inputs(run)
        except InputError as error:
            self.broken = error
            return None
        gpu = self.gpus[slot]
        command = self.spec.command(run, sys.executable, gpu or "")
        directory = self.sweep.directory(run)
        fit = process.start(command, point, run, directory, claim, slot, gpu, self.threads)
        if fit is not None:
            self.left = None if self.left is None else self.left - 1
            on = "" if gpu is None else f" on GPU {gpu}"
            begins = f"goes on from step {fit.furthest}" if fit.furthest else "started"
            self.say(f"{run.run} {begins}{on}; output in {fit.log}")
        return fit

    def check_inputs(self, run: Trial) -> None:
        """Raises an `InputError` if a run would not be comparable, or could not even begin."""
        if self.spec.read_base() != self.spec.fixed["base"]:
            names = ", ".join(str(file) for file in self.spec.base)
            raise InputError(
                f"{names} or a file it names has changed since this sweep began: change it back, "
                "or choose another name for the new sweep"
            )
        corpus = overlay([*self.spec.fixed["base"], run.overrides]).get(CORPUS)
        here = self.spec.launcher == LAUNCHER  # else it may be where only the run can see it
        if here and isinstance(corpus, str) and not Path(corpus).exists():
            raise InputError(
                f"data.corpus is {corpus} in {run.variant}, which does not exist: make it with "
                "`ropepp prepare`"
            )

    def settle(self, fit: Fit) -> None:
        """Writes down how a run has ended."""
        self.running.remove(fit)
        state, reason = fit.outcome()
        run, step = fit.trial.run, process.newest_step(fit.directory)
        if state == "failed" and self.asked:  # it was in the middle of something
            state, reason = "preempted", "asked to end"
        if state == "preempted" and not self.asked:
            self.kills[run] = 0 if step > fit.furthest else self.kills[run] + 1
            if self.kills[run] >= MOST_KILLS:
                state, reason = "failed", f"{reason}, {MOST_KILLS} times without a new checkpoint"
        if state == "preempted" and not fit.point.is_drawn:
            self.sweep.mark(fit.point, "WAITING")
        seconds = time.monotonic() - fit.began
        fit.release(state, reason)
        if state == "finished":
            self.seconds.append(seconds)
            value = self.value(fit.trial)
            self.say(f"{run} finished: {self.spec.metric} {value:.4f} in {duration(seconds)}")
        elif state == "preempted":
            self.say(f"{run} ended, newest checkpoint at step {step}: {reason}; it can go on")
        else:
            self.say(f"{run} {state}: {reason}; see {fit.log}")
        self.next_of(fit.point)

    def prune(self, fit: Fit) -> None:
        """Asks a drawn point's first run to end if the pruner says so."""
        if fit.trial != fit.point.runs[0]:
            return
        seen = intermediate(fit.directory, self.spec.metric)
        if seen.keys() - fit.reported and self.sweep.should_prune(fit.point, seen):
            fit.is_pruned = True
            fit.send(signal.SIGTERM)
        fit.reported |= seen.keys()

    def end_all(self) -> None:
        """Asks all runs to end and waits for them."""
        for fit in self.running:
            fit.send(signal.SIGTERM)
        if self.running:
            self.say(f"asked to end: waiting for {len(self.running)} to write a checkpoint")
        deadline = time.monotonic() + self.grace
        while self.running:
            for fit in list(self.running):
                if fit.has_ended():
                    self.settle(fit)
                elif time.monotonic() > deadline:
                    fit.send(signal.SIGKILL)
            time.sleep(POLL)
        raise Preempted("asked to end; the same command goes on")

    def forget_failures(self) -> None:
        """Lets what has failed be tried again."""
        for point in self.points:
            files = [self.sweep.directory(run) / OUTCOME for run in point.runs]
            failed = [file for file in files if read_json(file).get("state") == "failed"]
            for file in failed:
                file.unlink(missing_ok=True)
            if failed:
                self.sweep.try_again(point)

    # Words

    def say(self, text: str) -> None:
        """A line with the time, how much is done, and how long the rest may take."""
        runs = [run for point in self.points for run in point.runs]
        done = [run for run in runs if (self.sweep.directory(run) / RESULT).exists()]
        drawn = sum(point.is_drawn for point in self.points)
        missing = self.spec.trials * len(self.spec.rows) - drawn
        missing = 0 if self.all_drawn else max(0, missing) * len(self.spec.seeds)
        left = ""
        if self.seconds:
            each, now = mean(self.seconds), time.monotonic()
            begun = sum(max(0.0, each - (now - fit.began)) for fit in self.running)
            ended = {run.run for p in self.points if p.key in self.settled for run in p.runs}
            begun_or_done = {r.run for r in done} | {fit.trial.run for fit in self.running}
            waiting = missing + sum(run.run not in ended | begun_or_done for run in runs)
            seconds = (begun + each * waiting) / len(self.gpus)
            left = f"; about {duration(seconds)} left" if seconds > 0 else ""
        clock, total = time.strftime("%H:%M:%S"), len(runs) + missing
        print(f"{clock} [{len(done)}/{total}] {text}{left}", flush=True)
