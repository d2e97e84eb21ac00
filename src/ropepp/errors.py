"""Exceptions that speak to a user."""

import errno
from importlib.util import find_spec

# What a machine may lack or forbid, wherever it shows.
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EIO),
    *(errno.ESTALE, errno.ENOLCK, errno.ENOMEM, errno.EEXIST, errno.EFBIG),
}


class InputError(ValueError):
    """Bad input: names the file or key, the value found and what is allowed, in one line.

    The command line prints the message alone and ends with exit code 2; `--debug` shows the
    traceback.
    """


class Stopped(Exception):  # noqa: N818 (nothing is wrong with the program)
    """A run that ended before its last step, with a checkpoint from which it can go on.

    Attributes:
        code: Exit code of the command line, by which a scheduler tells the reason.
    """

    code = 1


class Preempted(Stopped):
    """The run was asked to end; the code is the customary "temporary failure, try again"."""

    code = 75


class Diverged(Stopped):
    """Too many steps in a row had to be skipped; to try again unchanged would not help."""

    code = 76


def user_message(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for any other.

    Frameworks wrap the error that says what is wrong, or raise another while cleaning up.
    """
    from jsonargparse import ArgumentError

    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and not isinstance(cause, InputError) and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        found = filter(None, map(_of_the_machine, seen))
        if message := next(found, None):
            return message
    # Lightning's own exception for a configuration that cannot be, imported if it was raised.
    misconfigured = type(error).__name__ == "MisconfigurationException"
    if cause is None and not isinstance(error, ArgumentError) and not misconfigured:
        return None
    return " ".join(str(cause or error).split())


def _of_the_machine(error: BaseException) -> str | None:
    """One line for an error that means that the machine has too little of something, or forbids."""
    memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and memory):
        detail = str(error).partition("\n")[0][:200]
        return (
            f"out of memory{f' ({detail})' if detail else ''}: lower data.micro_batch_size or "
            "data.sequence_length, set model.activation_checkpointing 1, or share the model "
            "(trainer.strategy fsdp2)"
        )
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        place = f"{error.filename}: " if error.filename is not None else ""
        more = "; raise it (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        return f"{place}{error.strerror}{more}"
    return None


def at_least(least: float, key: str = "", /, **values: float | None) -> None:
    """Checks settings that have one lower bound; None stands for one that is not given.

    Args:
        least: The bound.
        key: What stands before the settings' names in a configuration.
        values: Settings by their names.

    Raises:
        InputError: One is below the bound, or no number.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"{key}{name} is {value}; it must be at least {least}")


def require_package(package: str, extra: str, needed_by: str) -> None:
    """Refuses what a package is missing for.

    Raises:
        InputError: The package is not installed; names the extra that brings it.
    """
    if find_spec(package) is None:
        raise InputError(
            f"{needed_by} needs {package}, which is missing: pip install 'ropepp[{extra}]'"
        )
