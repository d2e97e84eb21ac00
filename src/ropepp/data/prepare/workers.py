"""Jobs over processes: progress comes back, and no death of a process goes unnoticed."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from tqdm import tqdm

from ropepp.errors import InputError
from ropepp.files import DiskError

REPORT_SECONDS = 0.2
LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


class Job(Protocol):
    """Something to do; `label` is what messages call it."""

    @property
    def label(self) -> str: ...


Report = Callable[[int, int, int], Any]  # bytes read, documents and tokens since the last call
Work = Callable[[Any, Report], None]


class Progress:
    """Bytes read of how many, documents, tokens, tokens a second and the time that is left: a bar
    on a terminal, otherwise a line now and then; a context manager.

    Args:
        label: What is done.
        total: Bytes to read.
        done: Bytes that need not be read any more.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done = label, total, done
        self._documents = self._tokens = self._bytes = 0
        self._began = self._shown = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit="B", unit_scale=True, disable=None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def __call__(self, count: int, documents: int, tokens: int) -> None:
        self._bytes += count
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._began, 1e-3)
        counts = f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:,.0f} tokens/s"
        self._bar.update(count)
        self._bar.set_postfix_str(counts, refresh=False)
        if self._bar.disable and now - self._shown > LINE_SECONDS:
            self._shown = now
            read = self._done + self._bytes
            left = (self._total - read) * (now - self._began) / max(self._bytes, 1)
            print(
                f"{self._label}: {read:,} of {self._total:,} bytes, {counts},"
                f" {left / 60:.1f} minutes left",
                file=sys.stderr,
                flush=True,
            )


def run_jobs(work: Work, jobs: Sequence[Job], processes: int, report: Report) -> list[InputError]:
    """Does every job; one that fails for its input does not keep the others from being done.

    Args:
        work: A function of a module, called with a job and where to report progress.
        jobs: What to do, in this order; with several processes they must be picklable.
        processes: How many work at a time; with 1 it is this one.
        report: Called with the progress of all.

    Returns:
        What was wrong, in the order of the jobs.

    Raises:
        DiskError: A file could not be written; the others would fail as well.
        InputError: A process was killed. What was not finished is to be done again.
    """
    if min(processes, len(jobs)) > 1:
        return _run_processes(work, jobs, processes, report)
    failures = []
    for job in jobs:
        try:
            work(job, report)
        except DiskError:
            raise
        except InputError as error:
            failures.append(error)
    return failures


def _run_processes(
    work: Work, jobs: Sequence[Job], processes: int, report: Report
) -> list[InputError]:
    waiting, failures = list(enumerate(jobs))[::-1], {}
    workers = {}
    try:
        for _ in range(min(processes, len(jobs))):
            worker = _Worker(work)
            workers[worker.connection] = worker
            worker.give(waiting.pop())
        while workers:
            for connection in wait(list(workers)):
                worker = workers[connection]  # type: ignore[index]
                error = worker.receive(report)
                if worker.busy:
                    continue
                if error is not None:
                    failures[worker.number] = error
                if waiting:
                    worker.give(waiting.pop())
                else:
                    del workers[worker.connection]
                    worker.end()
    finally:
        for worker in workers.values():
            worker.kill()
    return [failures[number] for number in sorted(failures)]


class _Worker:
    """A process that takes jobs, one at a time."""

    def __init__(self, work: Work) -> None:
        # Spawned: a fork of a process whose libraries have started threads may hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        # Held by that process alone, so that its end is the connection's end.
        theirs.close()
        self.busy, self.number, self.label = False, -1, ""

    def give(self, numbered: tuple[int, Job]) -> None:
        self.number, job = numbered
        self.busy, self.label = True, job.label
        try:
            self.connection.send(job)
        except ConnectionError:
            raise self._ended() from None

    def receive(self, report: Report) -> InputError | None:
        """Takes a message; of the last one of a job, what was wrong with it."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if kind == "progress":
            report(*content)
            return None
        self.busy = False
        if kind == "crash":
            raise RuntimeError(f"the process that worked on {self.label} failed:\n{content}")
        if isinstance(content, DiskError):
            raise content
        return content

    def _ended(self) -> InputError:
        self.process.join()
        return InputError(
            f"the process that worked on {self.label} ended with code {self.process.exitcode}"
            " (-9 means killed, often for want of memory: use fewer --processes)"
        )

    def end(self) -> None:
        self.connection.close()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker: jobs until the other side closes, however that ends."""
    # The parent decides what an interrupt from the keyboard means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread for each process: together they use the cores that they were given.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        while True:
            job = connection.recv()
            reporter = _Reporter(connection)
            connection.send(_result(work, job, reporter))
    except (EOFError, ConnectionError):
        # Also where the parent was killed: whoever reports to nobody stops.
        return


def _result(work: Work, job: Any, reporter: "_Reporter") -> tuple[str, Any]:
    try:
        work(job, reporter)
        reporter.flush()
    except ConnectionError:
        raise
    except InputError as error:
        return "done", type(error)(*error.args)
    except Exception:
        return "crash", traceback.format_exc()
    return "done", None


class _Reporter:
    """Adds progress up and sends it now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sums, self._sent = [0, 0, 0], time.monotonic()

    def __call__(self, *counts: int) -> None:
        self._sums = [total + count for total, count in zip(self._sums, counts, strict=True)]
        if time.monotonic() - self._sent > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("progress", tuple(self._sums)))
        self._sums, self._sent = [0, 0, 0], time.monotonic()
