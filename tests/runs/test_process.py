"""How an attempt ended, from its exit code and its log."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from ropepp.runs.process import RunProcess


@pytest.mark.parametrize(
    ("code", "log", "outcome"),
    [
        (75, "stopped at step 3 on request", ("preempted", "asked to end")),
        (None, "", ("preempted", "its driver was killed")),
        (-9, "", ("preempted", "killed by signal 9")),
        (143, "", ("preempted", "killed by signal 15")),
        (1, "  exitcode  : 75 (pid: 17)", ("preempted", "asked to end")),
        (1, "  exitcode  : 75 (pid: 17)\n$ again\nerror: no", ("failed", "exit code 1: error: no")),
        (-11, "a\nb", ("failed", "exit code -11: b")),
        (76, "20 steps in a row", ("failed", "exit code 76: 20 steps in a row")),
        (1, "[rank1]: KeyError: x\nChildFailed", ("failed", "exit code 1: [rank1]: KeyError: x")),
        (1, "", ("failed", "exit code 1: ")),
    ],
)  # fmt: skip
def test_outcomes(code: int | None, log: str, outcome: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "fit.log").write_text(f"error: of an earlier attempt\n$ command\n{log}\n")
    process: Any = None
    if code is not None:
        process = subprocess.Popen(["true"])
        process.wait()
        process.returncode = code
    assert RunProcess(tmp_path, 0, process, 0).outcome() == outcome
