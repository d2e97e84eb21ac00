"""Exceptions that speak to a user."""

import errno
import importlib
from numbers import Real
from typing import Any

# What a machine may lack or forbid, wherever it shows.
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EIO),
    *(errno.ESTALE, errno.ENOLCK, errno.ENOMEM, errno.EEXIST, errno.EFBIG),
}


class InputError(ValueError):
    """Bad input: names the file or key, the value found and what is allowed, in one line, which
    the command line prints before it ends with exit code 2; `--debug` shows the traceback."""


class Stopped(Exception):  # noqa: N818 (nothing is wrong with the program)
    """A run that ended before its last step, with a checkpoint from which it can go on; the command
    line ends with ``code``, by which a scheduler tells the reason."""

    code = 1


class Preempted(Stopped):
    """The run was asked to end; the code is the customary "temporary failure, try again"."""

    code = 75


class Diverged(Stopped):
    """Too many steps in a row had to be skipped; to try again unchanged would not help."""

    code = 76


def user_message(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for any other. Frameworks wrap the error
    that says what is wrong, or raise another while cleaning up."""
    from jsonargparse import ArgumentError

    chain = causes(error)
    said = [str(one) for one in chain if isinstance(one, InputError)]
    said += filter(None, map(_of_the_machine, chain))
    # Lightning's own exception for a configuration that cannot be, imported if it was raised.
    if isinstance(error, ArgumentError) or type(error).__name__ == "MisconfigurationException":
        said.append(str(error))
    return " ".join(said[0].split()) if said else None


def causes(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _of_the_machine(error: BaseException) -> str | None:
    """One line for an error that means that the machine has too little of something, or forbids."""
    memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and memory):
        detail = str(error).partition("\n")[0][:200]
        return (
            f"out of memory{f' ({detail})' if detail else ''}: to train, lower "
            "data.micro_batch_size or data.sequence_length, set model.activation_checkpointing 1, "
            "or share the model (trainer.strategy fsdp2); elsewhere ask for fewer tokens at once"
        )
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        place = f"{error.filename}: " if error.filename is not None else ""
        more = "; raise it (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        return f"{place}{error.strerror}{more}"
    return None


def optional(module: str, extra: str = "sweep", needed_by: str = "this") -> Any:
    """A module that an extra brings; an `InputError` if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{needed_by} needs {module}, which is missing ({error}): pip install 'ropepp[{extra}]'"
        ) from error


def at_least(least: float, key: str = "", /, **values: float | None) -> None:
    """Raises an `InputError` if a setting is below a bound, or no number; None stands for one that
    is not given, ``key`` is what stands before their names in a configuration."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Real) and value >= least):
            raise InputError(f"{key}{name} is {value!r:.80}; it must be at least {least}")
