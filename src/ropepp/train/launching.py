"""The process of a run: its place among others, its name, and the signals that ask it to end."""

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ropepp.errors import InputError
from ropepp.runs.process import STOP_SIGNALS


def default_run_name() -> str:
    """A scheduler's id of the job, the same in all processes; otherwise the time of the start."""
    for variable in ("ROPEPP_RUN", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(variable, "none") != "none":
            return os.environ[variable]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--run is missing: with several processes and no job id each would make up its own"
        )
    # Two may begin in one second. Processes that this one starts inherit the name.
    os.environ["ROPEPP_RUN"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return os.environ["ROPEPP_RUN"]


def is_child_process() -> bool:
    """Whether this is not the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) > 0


def is_first_process() -> bool:
    """Whether this is the first process of all."""
    ranks = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


@contextmanager
def own_process() -> Iterator[None]:
    """Handlers of signals, and the run's name in the environment, are as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    named = "ROPEPP_RUN" in os.environ
    if handlers[signal.SIGUSR1] is signal.SIG_DFL:  # which would kill where nothing is trained
        with suppress(ValueError):
            signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        yield
    finally:
        with suppress(ValueError):  # in another thread nothing was changed
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not named:
            os.environ.pop("ROPEPP_RUN", None)
