"""Jobs over processes: progress comes back, and no death of a process goes unnoticed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

from ropepp.errors import InputError
from ropepp.files import DiskError

REPORT_SECONDS = 0.2
LINE_SECONDS = 30.0  # between states of progress where there is no terminal

_counts: Any = None  # in a process of the pool: what all of them have reported


Report = Callable[..., Any]  # bytes read, documents and tokens since the last call, 0 if not given
Work = Callable[[Any, Report], Any]


class Progress(tqdm):
    """Bytes read of how many, documents, tokens, tokens a second and the time that is left: a bar
    on a terminal, and elsewhere its state now and then; a context manager."""

    def __init__(self, label: str, total: int) -> None:
        wait = 0.0 if sys.stderr.isatty() else LINE_SECONDS
        own = {"mininterval": wait or 0.1, "delay": wait}
        super().__init__(total=total, desc=label, unit="B", unit_scale=True, **own)
        self._documents = self._tokens = 0

    def __call__(self, count: int, documents: int = 0, tokens: int = 0) -> None:
        self._documents += documents
        self._tokens += tokens
        rate = self._tokens / max(self.format_dict["elapsed"], 1e-3)
        counts = f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f} tokens/s"
        self.set_postfix_str(counts, refresh=False)
        self.update(count)


def run_jobs(work: Work, jobs: Sequence[Any], processes: int, report: Report) -> list[Any]:
    """Does every job, which has a `label`, in this order; one that fails for its input does not
    keep the others from being done. With 1 process it is this one; with several the jobs must be
    picklable, and `work` a function of a module. Returns what it returned, or an `InputError` that
    says what was wrong, of each job.

    Raises a `DiskError` if a file could not be written, as the others would fail as well, and an
    `InputError` if a process was killed: what was not finished is to be done again."""
    if min(processes, len(jobs)) > 1:
        return _run_processes(work, jobs, min(processes, len(jobs)), report)
    return [_outcome(work, job, report) for job in jobs]


def _outcome(work: Work, job: Any, report: Report) -> Any:
    try:
        return work(job, report)
    except DiskError:
        raise
    except InputError as error:
        return error
    except Exception as error:
        error.add_note(f"while {job.label} was worked on")
        raise


def _run_processes(work: Work, jobs: Sequence[Any], processes: int, report: Report) -> list[Any]:
    # Spawned: a fork of a process whose libraries have started threads may hang.
    context = multiprocessing.get_context("spawn")
    counts: Any = context.Array("q", 3)
    # Closed when this process ends or gives up, which ends the others.
    theirs, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _begin, (theirs, counts))
    waiting, outcomes = list(enumerate(jobs))[::-1], {}
    running: dict[Future[Any], int] = {}
    reported = [0, 0, 0]
    try:
        while waiting or running:
            # No more than there are processes: then it is known what these work on.
            while waiting and len(running) < processes:
                number, job = waiting.pop()
                running[pool.submit(_outcome, work, job, _report)] = number
            done = wait(running, REPORT_SECONDS, FIRST_COMPLETED).done
            current = counts.get_obj()[:]
            report(*(now - before for now, before in zip(current, reported, strict=True)))
            reported = current
            for future in done:
                outcomes[running[future]] = future.result()
                del running[future]
        pool.shutdown()
    except BrokenProcessPool:
        labels = ", ".join(jobs[number].label for number in sorted(running.values()))
        raise InputError(
            f"a process was killed while these were worked on: {labels}"
            " (often for want of memory: use fewer --processes)"
        ) from None
    finally:
        lifeline.close()
        pool.shutdown()
    return [outcomes[number] for number in range(len(jobs))]


def _begin(lifeline: Connection, counts: Any) -> None:
    """Prepares a process of the pool."""
    # The parent decides what an interrupt from the keyboard means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread for each process: together they use the cores that they were given.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    global _counts
    _counts = counts


def _end_with(lifeline: Connection) -> None:
    """Ends this process when the parent ends or lets go, however that comes about."""
    lifeline.poll(None)
    os._exit(1)


def _report(*counts: int) -> None:
    with _counts.get_lock():
        for at, count in enumerate(counts):
            _counts[at] += count
