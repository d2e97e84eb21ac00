"""Runs Python programs in copies of one warm process, without importing torch and Lightning again
for each.

    python scripts/warm.py serve SOCKET [MODULE ...]    imports both and MODULEs, waits for requests
    python scripts/warm.py run SOCKET ...   as ``ropepp ...``: same output, signals and exit code
    python scripts/warm.py python SOCKET ...                as ``python ...``, the same
    python scripts/warm.py shim SOCKET FILE     writes a FILE that stands for ``python``

The server has run no tensor operation and started no thread, so that a fork of it is as good as a
new process. The client stands for the process: a signal to it reaches the program, and killing it
kills the program; files that it was given open are open there. With ``serve --attached`` the
server ends with the process that holds the other end of its standard input. For CPUs; a program
that is to use CUDA is better started by itself.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HIGH = 512  # where received descriptors wait until their own numbers are free
MOST_DESCRIPTORS = 250  # of one message


def serve(path: str, modules: Sequence[str] = (), attached: bool = False) -> NoReturn:
    """Answers requests at a socket until it is asked to end.

    Args:
        path: The socket.
        modules: What to import besides Lightning and our training.
        attached: Whether it ends when nobody holds the other end of its standard input.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does; read at loading
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)  # before the import, so that clients need not wait for it to connect
    for module in ("ropepp.train.lightning_cli", *modules):  # the first is what every fit imports
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the garbage collector of a child leaves shared pages alone
    wakeup, woken = socket.socketpair()
    woken.setblocking(False)
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(wakeup, selectors.EVENT_READ)
    if attached:
        selector.register(sys.stdin, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    try:
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    own = [connection, listener, wakeup, woken, selector, *children.values()]
                    pid = start(connection, own)
                    if pid is None:
                        connection.close()
                    else:
                        children[pid] = connection
                        selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj is wakeup:
                    wakeup.recv(4096)
                    reap(children, selector)
                elif key.fileobj is sys.stdin:
                    if not os.read(0, 1):
                        sys.exit(0)
                else:
                    pass_on(key.fileobj, children, selector)  # type: ignore[arg-type]
    finally:
        for pid in children:
            end(pid)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def pass_on(
    connection: socket.socket,
    children: dict[int, socket.socket],
    selector: selectors.BaseSelector,
) -> None:
    """A client passes a signal on, or is gone."""
    pid = next((p for p, other in children.items() if other is connection), None)
    data = b""
    with contextlib.suppress(OSError):
        data = connection.recv(1)
    if not data:
        selector.unregister(connection)
        if pid is not None:
            end(pid)
    elif pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, data[0])


def end(pid: int) -> None:
    """Kills a program and those clients that it has started."""
    for kill in (os.killpg, os.kill):  # before it has a group of its own, the process alone
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def reap(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tells clients how their programs ended."""
    while children:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        connection = children.pop(pid)
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
        connection.close()


def start(connection: socket.socket, own: list[Any]) -> int | None:
    """Forks a program; returns its process, or None if the client was gone. ``own`` are the
    server's open files."""
    descriptors = array.array("i")
    size = socket.CMSG_LEN(MOST_DESCRIPTORS * descriptors.itemsize)
    message, ancillary, *_ = connection.recvmsg(8, size)
    for _, _, data in ancillary:
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    pid = None
    with contextlib.suppress(EOFError):
        request = receive(connection, struct.unpack("q", message)[0]) if len(message) == 8 else b""
        # One that comes before the program is set up waits until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        pid = os.fork() if request else None
    if pid != 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    else:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for one in own:
            one.close()
        run_program(json.loads(request), list(descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def receive(connection: socket.socket, length: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: The other side has closed before.
    """
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def run_program(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """The rest of a forked process's life."""
    code = 1
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        take_over(descriptors, request["descriptors"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        threads = request["environment"].get("OMP_NUM_THREADS")
        if threads:  # the library has read the server's
            import torch

            torch.set_num_threads(int(threads))
        if request["executable"]:  # what the program starts is warm as well
            import multiprocessing

            sys.executable = request["executable"]
            multiprocessing.set_executable(sys.executable)
        interpret(request["arguments"])
        code = 0
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        finish()
        os._exit(code & 0xFF)


def take_over(descriptors: list[int], numbers: list[int]) -> None:
    """Opens what the client had open under the same numbers, and closes all else."""
    import fcntl

    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH) for descriptor in descriptors]
    os.closerange(3, HIGH)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def interpret(arguments: list[str]) -> None:
    """What ``python`` does with these arguments."""
    import runpy
    import types

    match arguments:
        case ["-m", module, *rest]:
            sys.path[0] = os.getcwd()
            sys.argv = ["-m", *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.path[0] = ""
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case [file, *_]:
            sys.path[0] = os.path.dirname(os.path.abspath(file))
            sys.argv = list(arguments)
            runpy.run_path(file, run_name="__main__")


def finish() -> None:
    """What an interpreter does at its end."""
    import atexit
    import threading

    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def run(path: str, arguments: list[str], executable: str = "") -> int:
    """Runs ``python`` with these arguments in a fork of the server; returns its exit code.

    Args:
        path: The server's socket.
        arguments: ``-m module ...``, ``-c code ...`` or ``file ...``.
        executable: What the program finds in ``sys.executable``; its own by default.
    """
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself is closed by now
            os.fstat(int(name))
            numbers.append(int(name))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        print(f"error: no server at {path}: {error.strerror}", file=sys.stderr)
        return 1
    for number in PASSED_ON:
        # Also where this one was started to ignore it: the program may have a handler of its own.
        signal.signal(number, lambda n, _: connection.send(bytes([n])))
    request = {
        "arguments": arguments,
        "descriptors": numbers,
        "environment": dict(os.environ),
        "executable": executable,
        "folder": str(Path.cwd()),
    }
    data = json.dumps(request).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))
    connection.sendmsg([struct.pack("q", len(data))], [rights])
    connection.sendall(data)
    for number in numbers:
        if number > 2:
            os.close(number)  # who waits for the other end of a pipe waits for the program alone
    try:
        answer = connection.recv(4)
    except ConnectionResetError:
        answer = b""
    if len(answer) < 4:
        print(f"error: the server at {path} is gone", file=sys.stderr)
        return 1
    code: int = struct.unpack("i", answer)[0]
    if code < 0:  # end in the same way
        with contextlib.suppress(OSError):  # what cannot be caught needs no default
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def write_shim(path: str, file: str) -> None:
    """Writes a program that stands for ``python``."""
    text = f"""#!{sys.executable} -S
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import warm
arguments = sys.argv[1:]
while arguments and arguments[0] in ("-B", "-u", "-S", "-s", "-E", "-I"):
    del arguments[0]
sys.exit(warm.run({path!r}, arguments, __file__))
"""
    Path(file).write_text(text)
    Path(file).chmod(0o755)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", "--attached", path, *modules]:
            serve(path, modules, attached=True)
        case ["serve", path, *modules]:
            serve(path, modules)
        case ["run", path, *arguments]:
            sys.exit(run(path, ["-m", "ropepp.cli", *arguments]))
        case ["python", path, *arguments]:
            sys.exit(run(path, arguments))
        case ["shim", path, file]:
            write_shim(path, file)
        case _:
            sys.exit(__doc__)
