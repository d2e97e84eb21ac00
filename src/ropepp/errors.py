"""The one exception that speaks to a user."""


class InputError(ValueError):
    """Bad input: names the file or key, the value found and what is allowed, in one line.

    The command line prints the message alone and ends with exit code 2; `--debug` shows the
    traceback.
    """
