import os
import time
from dataclasses import dataclass

import pytest

from ropepp.data.prepare import workers
from ropepp.data.prepare.workers import Progress, Report, run_jobs
from ropepp.errors import InputError
from ropepp.files import DiskError

BOTH = pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])


@dataclass(frozen=True)
class Number:
    """What `work` does depends on it."""

    value: int

    @property
    def label(self) -> str:
        return f"number {self.value}"


def work(job: Number, report: Report) -> int:
    if job.value == 13:
        raise DiskError("disk full")
    if job.value == 14:
        raise KeyError("a mistake in the program")
    if job.value == 15:
        os._exit(3)
    if job.value % 2:
        time.sleep(0.05 * (5 - job.value))
        raise InputError(f"{job.value} is odd")
    for _ in range(10):
        report(1, 2, 3)
    return job.value


class Sums:
    def __init__(self) -> None:
        self.counts = (0, 0, 0)

    def __call__(self, *counts: int) -> None:
        self.counts = tuple(map(sum, zip(self.counts, counts, strict=True)))  # type: ignore[assignment]


@BOTH
def test_all_jobs_are_done_and_what_was_wrong_is_in_their_order(processes: int) -> None:
    sums = Sums()
    found = run_jobs(work, [Number(n) for n in range(7)], processes, sums)
    assert list(map(str, found)) == ["0", "1 is odd", "2", "3 is odd", "4", "5 is odd", "6"]
    assert sums.counts == (40, 80, 120)
    assert run_jobs(work, [], processes, sums) == []


@BOTH
def test_a_full_disk_ends_the_work(processes: int) -> None:
    with pytest.raises(DiskError, match="disk full"):
        run_jobs(work, [Number(n) for n in (2, 13, 1, 2, 2)], processes, Sums())


@BOTH
def test_a_mistake_in_the_program_is_no_bad_input(processes: int) -> None:
    with pytest.raises(KeyError, match="a mistake in the program") as caught:
        run_jobs(work, [Number(n) for n in (2, 14, 2)], processes, Sums())
    if processes > 1:
        assert "in work" in str(caught.value.__cause__)  # the traceback of the other process
    assert caught.value.__notes__ == ["while number 14 was worked on"]


@pytest.mark.slow
def test_a_process_that_ends_is_noticed() -> None:
    message = "a process was killed while these were worked on: .*number 15"
    with pytest.raises(InputError, match=message):
        run_jobs(work, [Number(n) for n in (2, 15, 2)], 2, Sums())


def test_progress_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, told in ((30.0, False), (0.0, True)):
        monkeypatch.setattr(workers, "LINE_SECONDS", seconds)
        with Progress("encode", total=5000) as progress:
            for _ in range(4):
                progress(500, 10, 4000)
        shown = capsys.readouterr().err
        assert ("encode:  40%" in shown and "40 documents, 16,000 tokens, " in shown) == told
        assert told or not shown
