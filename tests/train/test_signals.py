"""A run that is asked to end, or whose terminal is gone, saves; its processes end with it."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.fit_runs import arguments, finish, start, wait_for_step
from helpers.golden_data import REPOSITORY
from helpers.sweep_runs import is_alive, wait_until

pytestmark = pytest.mark.slow
ENDLESS: dict[str, Any] = {
    "trainer__max_steps": 10**6,
    "checkpoint__every_n_steps": 0,
    "data__validate_every_n_steps": 0,
}


def saved(run: Path) -> bool:
    return bool(list((run / "checkpoints").glob("step-*.ckpt")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "default" / "run"


@pytest.mark.extra
def test_asked_again_and_again(corpus: Path, tmp_path: Path, run: Path) -> None:
    process = start(corpus, tmp_path, "run", python=sys.executable, **ENDLESS)
    wait_for_step(process, run, 3)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert "--resume auto goes on" in finish(process, code=75)
    assert saved(run)


def test_nohup(corpus: Path, tmp_path: Path, run: Path) -> None:
    """What was ignored at the start stays so; SIGTERM still saves."""
    script = tmp_path / "nohup.py"
    script.write_text(
        "import signal, sys\nfrom ropepp.cli import main\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nsys.exit(main())\n"
    )
    process = start(corpus, tmp_path, "run", script=script, **ENDLESS)
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_step(process, run, 20)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert saved(run)


@pytest.mark.parametrize(
    "ends", ["hangup", *(pytest.param(x, marks=pytest.mark.extra) for x in ("pty", "pipe"))]
)
def test_a_terminal_that_is_gone(corpus: Path, tmp_path: Path, run: Path, ends: str) -> None:
    """A closed pseudo-terminal, as when tmux ends, hangs up and refuses output; a closed pipe does
    the latter alone, and training goes on."""
    ours, theirs = os.pipe() if ends == "pipe" else pty.openpty()
    script = tmp_path / "in_terminal.py"
    script.write_text(
        "import fcntl, sys, termios\nfrom ropepp.cli import main\n"
        "if sys.stdin.isatty(): fcntl.ioctl(0, termios.TIOCSCTTY, 0)\nsys.exit(main())\n"
    )
    command = [sys.executable, str(script), *arguments(corpus, tmp_path, "run", **ENDLESS)]
    process: Any = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, start_new_session=True
    )
    os.close(theirs)
    wait_for_step(process, run, 2)
    if ends == "hangup":
        os.killpg(process.pid, signal.SIGHUP)
    os.close(ours)
    if ends == "pipe":
        wait_for_step(process, run, 60)
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert saved(run)


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Processes that a test may leave behind when it fails."""
    found: list[int] = []
    yield found
    for pid in filter(is_alive, found):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.extra)]
)
def test_no_orphans(
    corpus: Path, tmp_path: Path, number: signal.Signals, children: list[int]
) -> None:
    """The parent ends while its second process begins; that one ends too."""
    two = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__micro_batch_size": 2}
    process = start(corpus, tmp_path, "run", python=sys.executable, **ENDLESS, **two)
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def begun() -> bool:
        others = map(int, tasks.read_text().split())
        children[:] = [
            pid for pid in others if b"ropepp" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return bool(children)

    wait_until(begun)
    process.send_signal(number)
    assert process.wait(30) == -number
    wait_until(lambda: not any(map(is_alive, children)), seconds=30)


@pytest.mark.extra
def test_no_orphans_of_torchrun(
    corpus: Path, tmp_path: Path, run: Path, children: list[int]
) -> None:
    """Killed, it cannot end its processes, which wait for each other."""
    two = {"trainer__devices": 2, "trainer__strategy": "fsdp2", "data__micro_batch_size": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "--", "ropepp.cli"]
    command += arguments(corpus, tmp_path, "run", **ENDLESS, **two)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
    wait_for_step(process, run, 2)
    children[:] = map(
        int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    assert len(children) == 2
    process.kill()
    process.wait(30)
    wait_until(lambda: not any(map(is_alive, children)), seconds=30)
