"""The same command twice at once: one of them may be refused in words, and the result is the
undisturbed one."""

import time

from faults_parts import Fault, Job
from faults_tools import Try
from faults_world import (
    CONSOLIDATED,
    EVALUATE,
    EXPORTED,
    FITTED,
    GENERATED,
    IMPORTED,
    LONGER,
    PIPED,
    PREPARED,
    REPLACED,
    SHARDED,
    SWEPT,
)


def faults() -> list[Fault]:
    """A row a command."""
    jobs = (PREPARED, REPLACED, FITTED, SHARDED, LONGER, EVALUATE, SWEPT, PIPED, EXPORTED, IMPORTED,
            CONSOLIDATED, GENERATED)  # fmt: skip
    return [
        Fault("two", f"{job.name}, twice", lambda one, job=job: twice(one, job)) for job in jobs
    ]


def twice(one: Try, job: Job) -> None:
    """Begun at nearly the same time, or the second within the first one's work."""
    _, seconds, _ = one.bench.expected(job)
    one.copy(*job.needs)
    first = one.start(job.argv)
    pause = one.random.choice((0.0, one.random.uniform(0, 0.05), one.random.uniform(0, seconds)))
    time.sleep(pause)
    second = one.start(job.argv)
    both = [one.finish(first), one.finish(second)]
    one.notes.append(f"the second {pause:.2f} s later; {both[0].code} and {both[1].code}")
    for done in both:
        if done.code == 2:
            if one.names(done, [job.made, "new", "s.yaml", "p.yaml"]):
                one.count("detected", done.last)
        elif done.code != 0 and not done.hung:
            one.count("tracebacks", f"exit code {done.code}: {done.last}")
    good = [done for done in both if done.code == 0]
    if not good:  # one of them had to begin again: nothing may be lost by that
        good = [one.run(job.argv)]
    one.compare(job, good[0])
