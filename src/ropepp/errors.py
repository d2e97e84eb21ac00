"""Exceptions that speak to a user."""


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
