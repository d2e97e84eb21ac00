"""A Python whose processes have imported torch and Lightning when they begin: each is a fork of
one server, which the first call starts and which ends with the process of the tests."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import warm

# What fits and drivers import as they go.
MODULES = ("omegaconf.grammar_parser", "torch.distributed.checkpoint.state_dict")

_server: subprocess.Popen[bytes] | None = None
_folder: Path | None = None


def python() -> str:
    """The program that stands for ``python``. Where a test is about processes themselves (their
    number, their death, their memory, what they import), it takes ``sys.executable``."""
    global _server, _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="ropepp-warm-"))
        socket = _folder / "socket"
        warm.write_shim(str(socket), str(_folder / "python"))
        command = [sys.executable, warm.__file__, "serve", "--attached", str(socket), *MODULES]
        _server = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not socket.exists():
            assert _server.poll() is None, "the server of warm processes has not begun"
            time.sleep(0.02)
    return str(_folder / "python")


@contextmanager
def everywhere() -> Iterator[None]:
    """``sys.executable``, by which the code under test starts Python, is that program meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python())
        yield


def end() -> None:
    """Ends the server."""
    global _server, _folder
    if _server is not None and _folder is not None:
        _server.terminate()
        _server.wait()
        shutil.rmtree(_folder, ignore_errors=True)
        _server = _folder = None
