"""Runs ``ropepp`` commands in copies of one warm process, without importing torch and Lightning
again for each.

    python scripts/warm.py serve SOCKET     imports both once, then waits for requests
    python scripts/warm.py run SOCKET ...   as ``ropepp ...``: same output, signals and exit code

The server has run no tensor operation and started no thread, so that a fork of it is as good as a
new process. The client stands for the process: a signal to it reaches the command, and killing it
kills the command. For CPUs; a command that is to use CUDA is better started by itself.
"""

import array
import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def serve(path: str) -> NoReturn:
    """Answers requests at a socket until it is asked to end."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does; read at loading
    import ropepp.train.lightning_cli  # noqa: F401 (what every fit imports)

    gc.collect()
    gc.freeze()  # the garbage collector of a child leaves shared pages alone
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    wakeup, woken = socket.socketpair()
    woken.setblocking(False)
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(wakeup, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid = start(connection, listener, [wakeup, woken, *children.values()])
                if pid is None:
                    connection.close()
                else:
                    children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ)
            elif key.fileobj is wakeup:
                wakeup.recv(4096)
                reap(children, selector)
            else:  # the client is gone, or passes a signal on
                connection = key.fileobj  # type: ignore[assignment]
                pid = next((p for p, other in children.items() if other is connection), None)
                data = b""
                with contextlib.suppress(OSError):
                    data = connection.recv(1)
                if not data:
                    selector.unregister(connection)
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, data[0] if data else signal.SIGKILL)


def reap(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tells clients how their commands ended."""
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


def start(connection: socket.socket, listener: socket.socket, others: list[Any]) -> int | None:
    """Forks a command; returns its process, or None if the client was gone."""
    descriptors = array.array("i")
    size = socket.CMSG_LEN(3 * descriptors.itemsize)
    message, ancillary, *_ = connection.recvmsg(8, size)
    if len(message) < 8:
        return None
    for _, _, data in ancillary:
        descriptors.frombytes(data[: 3 * descriptors.itemsize])
    request = b""
    length = struct.unpack("q", message)[0]
    while len(request) < length:
        request += connection.recv(length - len(request)) or b"\0" * length
    pid = os.fork()
    if not pid:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for one in (connection, listener, *others):
            one.close()
        run_command(json.loads(request), list(descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def run_command(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """The rest of a forked process's life."""
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    code = 1
    try:
        os.chdir(request["folder"])
        sys.argv = ["ropepp", *request["arguments"]]
        threads = request["environment"].get("OMP_NUM_THREADS")
        if threads:  # the library has read the server's
            import torch

            torch.set_num_threads(int(threads))
        from ropepp.cli import main

        code = main(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def run(path: str, arguments: list[str]) -> int:
    """Runs a command in a fork of the server; returns its exit code."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda n, _: connection.send(bytes([n])))
    request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    data = json.dumps(request).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    connection.sendmsg([struct.pack("q", len(data))], [rights])
    connection.sendall(data)
    answer = connection.recv(4)
    if len(answer) < 4:
        print(f"error: the server at {path} is gone", file=sys.stderr)
        return 1
    code = struct.unpack("i", answer)[0]
    if code < 0:  # end in the same way
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", path]:
            serve(path)
        case ["run", path, *arguments]:
            sys.exit(run(path, arguments))
        case _:
            sys.exit(__doc__)
