"""A program in a fork of the warm server is like one in an interpreter of its own."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from helpers import warm_python
from helpers.sweep_runs import is_alive, wait_until

pytestmark = pytest.mark.slow


def run(code: str, *args: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python.python(), "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([warm_python.python(), "-c", code], stdout=subprocess.PIPE, text=True)


def test_arguments_folder_environment_and_streams(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['X'], sys.stdin.read())"
    done = run(code, "a b", "-c", cwd=tmp_path, env={**os.environ, "X": "y"}, input="words")
    assert done.stdout == f"['-c', 'a b', '-c'] {tmp_path} y words\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_it_begins_with_torch_and_one_thread() -> None:
    code = (
        "import os, sys; "
        "print('torch' in sys.modules, len(os.listdir('/proc/self/task')), sys.executable)"
    )
    assert run(code).stdout == f"True 1 {warm_python.python()}\n"


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [
        ("raise SystemExit", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('words')", 1),
        ("raise ValueError('words')", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_ends(code: str, ends_with: int) -> None:
    done = run(code)
    assert done.returncode == ends_with
    assert ("words" in done.stderr) == ("words" in code)


def test_files_modules_and_threads_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(
        "import atexit, sys, threading, time\n"
        "from neighbour import word\n"
        "atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print(word))).start()\n"
        "print(__name__, sys.argv)\n"
    )
    (tmp_path / "neighbour.py").write_text("word = 'thread'")
    for words, cwd in (([str(file)], None), (["-m", "file"], tmp_path)):
        command = [warm_python.python(), *words, "x"]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout
        assert out == f"__main__ ['{file}', 'x']\nthread\nlast\n"


def test_open_files_are_passed_under_their_numbers() -> None:
    read, write = os.pipe()
    run(f"import os; os.write({write}, b'through')", pass_fds=[write])
    os.close(write)
    assert os.read(read, 100) == b"through"
    assert os.read(read, 100) == b""  # nobody else holds it
    os.close(read)


def test_signals_reach_it_and_a_kill_kills_it() -> None:
    waits = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    process = start(waits)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75

    process = start(waits)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.kill()
    process.communicate(timeout=60)  # its output ends with it
    wait_until(lambda: not is_alive(pid))
