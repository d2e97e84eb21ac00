"""What long work outlives, its terminal, and what it does not, the process that started it."""

import contextlib
import errno
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

PARENT = "ROPEPP_PARENT"  # environment: the process that started the others of its machine
LOST = (errno.EIO, errno.EPIPE, errno.EBADF)  # a closed terminal, a reader that has ended
POLL = 1.0  # seconds, where the system cannot tell of a process's end


class LastingStream:
    """A text stream that is written to as long as anybody reads it; afterwards its file is
    ``/dev/null``, for all that writes there without this, too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any, *args: str) -> None:
        try:
            action(*args)
        except OSError as error:  # of a full disk the text is lost, and the work is not
            if error.errno in LOST:
                with contextlib.suppress(OSError, ValueError):
                    to_nowhere(self._stream)


def to_nowhere(stream: TextIO) -> None:
    """Lets a stream's file be ``/dev/null`` from now on."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within its block, standard output and error may be lost without an error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LastingStream, before)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def end_with_starter() -> None:
    """Lets this process end as soon as the one that started it is gone, without a word to the
    others, who might wait for each other: for those that Lightning or torchrun starts.

    It waits in a thread of its own. A signal at the parent's death (PR_SET_PDEATHSIG) would come at
    the end of the parent's thread, and not at all if the parent had died before.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and PARENT in os.environ:
        parent = int(os.environ[PARENT])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
    else:
        os.environ[PARENT] = str(os.getpid())
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    try:
        handle = os.pidfd_open(parent)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):  # another system, or one that does not allow it
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(parent, 0)
                time.sleep(POLL)
    os._exit(1)
