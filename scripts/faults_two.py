"""The same command twice at once: one of them may be refused in words, and the result is the
undisturbed one."""

import json
import time

from faults_parts import Fault, Job
from faults_tools import Try
from faults_world import (
    CONSOLIDATED,
    CONVERTED,
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
            CONSOLIDATED, GENERATED, CONVERTED)  # fmt: skip
    rows = [
        Fault("two", f"{job.name}, twice", lambda one, job=job: twice(one, job)) for job in jobs
    ]
    return [*rows, Fault("two", "evaluate, two models into one folder", two_models)]


def two_models(one: Try) -> None:
    """Evaluations of two models into one folder: both are there in the end."""
    one.copy(*EVALUATE.needs, "logs/t/packed")
    commands = [
        (*EVALUATE.argv[:1], f"logs/t/{name}", *EVALUATE.argv[2:]) for name in ("a", "packed")
    ]
    processes = [one.start(argv) for argv in commands]
    both = [one.finish(process) for process in processes]
    for argv, done in zip(commands, both, strict=True):
        if done.code == 2 and one.names(done, ["e is in use", "e/"]):
            one.count("detected", done.last)
        if done.code != 0 and one.run(argv).code != 0:
            return one.count("lost", f"{argv[1]} cannot be evaluated")
    known = [json.loads(file.read_text()) for file in (one.folder / "e").glob("evaluation*.json")]
    found = {name for content in known for name in content["models"]}
    if len(found) < 2:
        return one.count("lost", f"there are results of {found} alone")
    return one.count("recovered")


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
