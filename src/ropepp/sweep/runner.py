"""``ropepp sweep run``: drives the runs of a sweep, several at a time, until nothing is left.

The run directories say what is done, their locks who does what (see `ropepp.runs.process`), so that
any number of drivers may work on one sweep, and each may be killed at any time.
"""

import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ropepp.errors import InputError, Preempted
from ropepp.runs import process
from ropepp.runs.config import RunsConfig
from ropepp.runs.process import GRACE, RunProcess, StopRequest, write_outcome
from ropepp.runs.records import RunSpec, read_result
from ropepp.runs.settings import overlay
from ropepp.runs.status import OUTCOME, duration, read_outcome
from ropepp.sweep.config import CORPUS
from ropepp.sweep.study import SweepStudy, Trial

REREAD = 10.0  # seconds between looks for trials that other drivers have drawn
MOST_KILLS = 3  # in a row without a new checkpoint; then it is the run's fault


@dataclass
class Running:
    """A run of this driver: its process, its slot, and what the pruner has seen of it."""

    trial: Trial
    spec: RunSpec
    process: RunProcess
    slot: int
    is_pruned: bool = False
    seen: set[int] = field(default_factory=set)  # steps


class Driver:
    """Runs what is left of a sweep, ``limit`` runs at most, one at a time for each of ``gpus``: a
    device, or None for any. Runs that are asked to end are killed after ``grace`` seconds."""

    def __init__(
        self,
        study: SweepStudy,
        gpus: list[str | None],
        retry_failed: bool = False,
        limit: int | None = None,
        grace: float = GRACE,
    ) -> None:
        self.study, self.config, self.gpus, self.grace = study, study.config, gpus, grace
        self.left = limit
        self.running: list[Running] = []
        self.trials = study.trials()
        self.finished: dict[str, str] = {}  # by trial: complete, failed or pruned
        self.all_drawn = not self.config.search
        self.kills: Counter[str] = Counter()
        self.seconds: list[float] = []  # of runs that finished here
        self.stop = StopRequest()
        self.broken: InputError | None = None  # why no more runs can be started
        self.held_by_others: set[str] = set()  # runs
        self.reread = time.monotonic()
        everywhere = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if everywhere else os.cpu_count() or 1
        share = len(gpus) > 1 and gpus[0] is None
        self.threads = max(1, cores // len(gpus)) if share else None
        for directory in (study.directory(spec) for trial in self.trials for spec in trial.runs):
            if retry_failed and read_outcome(directory).get("state") == "failed":
                (directory / OUTCOME).unlink(missing_ok=True)

    def run(self) -> None:
        """Returns when nothing is left that could be done here. Raises `Preempted` if it was asked
        to end; an `InputError` if the configuration has changed, or the corpus is missing."""
        with self.stop:
            while not self.stop.made:
                self.look_after()
                while self.begin():
                    pass
                if not self.running and (self.broken or not self.held_by_others):
                    break
                time.sleep(process.POLL)
            if self.stop.made:
                self.end_all()
        if self.broken:
            raise self.broken

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do for anybody."""
        return self.all_drawn and all(self.next_of(trial) is None for trial in self.trials)

    def look_after(self) -> None:
        """Takes note of runs that have ended, and ends those that the pruner gives up."""
        for run in list(self.running):
            if run.process.has_ended():
                self.settle(run)
            elif self.config.pruner_options["name"] != "none":
                self.prune(run)
        if self.config.search and time.monotonic() - self.reread > REREAD:
            self.trials, self.reread = self.study.trials(), time.monotonic()

    def begin(self) -> bool:
        """Starts or adopts a run, or draws a trial; returns whether there was something to do."""
        if len(self.running) == len(self.gpus) or self.stop.made or self.broken:
            return False
        before, self.held_by_others = self.held_by_others, set()
        mine = {run.spec.run for run in self.running}
        pairs = [(trial, self.next_of(trial)) for trial in self.trials]
        todo = [(trial, spec) for trial, spec in pairs if spec is not None and spec.run not in mine]
        orphans = {s.run for _, s in todo if process.is_orphan(self.study.directory(s))}
        # Orphans first, they take room already; what was killed comes last.
        todo.sort(key=lambda pair: (pair[1].run not in orphans, self.kills[pair[1].run]))
        for trial, spec in todo:
            if spec.run not in orphans and (self.left == 0 or self.broken):
                return False
            if self.take(trial, spec):
                return True
            self.held_by_others.add(spec.run)
        if self.left == 0 or self.broken:
            return False
        if not self.all_drawn and self.draw():
            return True
        if not self.running and self.held_by_others != before and self.held_by_others:
            held = ", ".join(sorted(self.held_by_others))
            self.say(f"waiting for {held}, which other drivers have")
        return False

    def draw(self) -> bool:
        """Looks for trials that are not known here; returns whether there are any."""
        known = len(self.trials)
        try:
            self.all_drawn = not self.study.draw()
        except InputError as error:  # a result lacks the metric
            self.broken = error
            return False
        self.trials = self.study.trials()
        return not self.all_drawn or len(self.trials) > known

    def next_of(self, trial: Trial) -> RunSpec | None:
        """The run that a trial needs next, None if it is complete, failed or pruned."""
        if trial.name in self.finished:
            return None
        state = self.study.state_of(trial)
        open_runs = [s for s in trial.runs if not read_result(self.study.directory(s))]
        if state == "open":
            return open_runs[0]
        self.finished[trial.name] = state
        for directory in map(self.study.directory, open_runs):
            if not (directory / OUTCOME).exists():
                write_outcome(directory, state, "another seed of it was")
        return None

    def take(self, trial: Trial, spec: RunSpec) -> bool:
        """Claims a run and starts or adopts it; returns whether something has changed."""
        directory = self.study.directory(spec)
        self.study.write(spec)  # the driver that drew it may have died over it
        claim = process.claim(directory)
        if claim is None:
            return False
        ended = read_outcome(directory).get("state") in ("failed", "pruned")
        if ended or read_result(directory):  # in the meantime, by another driver
            os.close(claim)
            return True
        free = sorted(set(range(len(self.gpus))) - {run.slot for run in self.running})
        slot, found = free[0], process.adopt(directory, claim)
        if found is not None:
            gpu = process.starter(directory).get("gpus")
            slot = next((n for n in free if self.gpus[n] == gpu), slot)
            self.say(f"{spec.run} goes on without its driver: adopted")
        else:
            found = self.start(spec, claim, self.gpus[slot])
        if found is None:
            os.close(claim)
            return False
        self.running.append(Running(trial, spec, found, slot))
        return True

    def start(self, spec: RunSpec, claim: int, gpu: str | None) -> RunProcess | None:
        try:
            self.check_inputs(spec)
        except InputError as error:
            self.broken = error
            return None
        arguments = self.config.arguments(spec)
        command = self.config.launch(arguments, python=sys.executable, gpus=gpu or "")
        run = process.start(command, self.study.directory(spec), claim, gpu, self.threads)
        if run is not None:
            self.left = None if self.left is None else self.left - 1
            on = "" if gpu is None else f" on GPU {gpu}"
            begins = f"goes on from step {run.furthest}" if run.furthest else "started"
            self.say(f"{spec.run} {begins}{on}; output in {run.log}")
        return run

    def check_inputs(self, spec: RunSpec) -> None:
        """Raises an `InputError` if a run would not be comparable, or could not even begin."""
        if self.config.read_base() != self.config.fixed["base"]:
            raise InputError(
                f"{', '.join(self.config.base)} or a file it names has changed since this sweep "
                "began: change it back, or choose another name for the new sweep"
            )
        corpus = overlay([*self.config.fixed["base"], spec.overrides]).get(CORPUS)
        # With a launcher of one's own it may be where only the run can see it.
        here = self.config.launcher == RunsConfig.launcher
        plain = corpus if isinstance(corpus, str) and "${" not in corpus else "."
        if here and not Path(plain).exists():
            raise InputError(
                f"data.corpus is {corpus} in {spec.variant}, which does not exist: make it with "
                "`ropepp prepare`"
            )

    def settle(self, run: Running) -> None:
        self.running.remove(run)
        state, reason = run.process.outcome()
        name, step = run.spec.run, process.newest_step(run.process.directory)
        if run.is_pruned and state != "finished":
            state, reason = "pruned", "no better than others at this step"
        if state == "failed" and self.stop.made:  # it was in the middle of something
            state, reason = "preempted", "asked to end"
        if state == "preempted" and not self.stop.made:
            self.kills[name] = 0 if step > run.process.furthest else self.kills[name] + 1
            if self.kills[name] >= MOST_KILLS:
                state, reason = "failed", f"{reason}, {MOST_KILLS} times without a new checkpoint"
        run.process.release(state, reason)
        if state == "finished":
            self.seconds.append(time.monotonic() - run.process.began)
            took, value = duration(self.seconds[-1]), self.value(run.spec)
            self.say(f"{name} finished: {self.config.metric} {value:.4f} in {took}")
        elif state == "preempted":
            self.say(f"{name} ended, newest checkpoint at step {step}: {reason}; it can go on")
        else:
            self.say(f"{name} {state}: {reason}; see {run.process.log}")
        self.next_of(run.trial)

    def value(self, spec: RunSpec) -> float:
        """What a finished run came to; without the metric no other run need be started."""
        try:
            return self.study.metric(spec)
        except InputError as error:
            self.broken = error
            return float("nan")

    def prune(self, run: Running) -> None:
        """Asks a drawn trial's first run to end if the pruner says so."""
        if run.is_pruned or not run.trial.params or run.spec != run.trial.runs[0]:
            return
        new = self.study.evaluations(run.spec).keys() - run.seen
        if new and self.study.is_hopeless(run.trial, new):
            run.is_pruned = True
            run.process.send(signal.SIGTERM)
        run.seen |= new

    def end_all(self) -> None:
        """Asks all runs to end and waits for them."""
        if self.running:
            self.say(f"asked to end: waiting for {len(self.running)} to write a checkpoint")
        process.end_all([run.process for run in self.running], self.grace)
        for run in list(self.running):
            self.settle(run)
        raise Preempted("asked to end; the same command goes on")

    def say(self, text: str) -> None:
        """A line with the time, how much is done, and how long the rest may take."""
        runs = [spec for trial in self.trials for spec in trial.runs]
        done = {spec.run for spec in runs if read_result(self.study.directory(spec))}
        drawn = sum(bool(trial.params) for trial in self.trials)
        missing = self.config.trials * len(self.config.rows) - drawn
        missing = 0 if self.all_drawn else max(0, missing) * len(self.config.seeds)
        left = ""
        if self.seconds:
            each, now = fmean(self.seconds), time.monotonic()
            begun = sum(min(each, now - run.process.began) for run in self.running)
            rest = [s.run for t in self.trials if t.name not in self.finished for s in t.runs]
            seconds = (each * (missing + len({*rest} - done)) - begun) / len(self.gpus)
            left = f"; about {duration(seconds)} left" if seconds > 0 else ""
        clock, total = time.strftime("%H:%M:%S"), len(runs) + missing
        print(f"{clock} [{len(done)}/{total}] {text}{left}", flush=True)
