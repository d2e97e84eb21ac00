"""The ``ropepp`` command. Only the subcommand's module in `ropepp.commands` is imported, and that
imports what it needs, so that help and small tools start at once."""

import importlib
import os
import select
import signal
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper

from ropepp.errors import InputError, Stopped, causes, user_message
from ropepp.files import one_command
from ropepp.options import TRUST
from ropepp.runs.survival import to_nowhere

COMMANDS = {
    "prepare": "make token files from text",
    "corpus": "inspect token files, or compare them with their checksums",
    "configs": "copy the shipped configurations into a folder, to train from and to change",
    "fit": "train a model",
    "validate": "loss and perplexity of a checkpoint on the validation split",
    "test": "the same under the name test",
    "predict": "negative log-likelihood of every token, written to files",
    "generate": "continue prompts",
    "evaluate": "perplexity, short tasks, RULER and BABILong of one or many models in one table",
    "analyze": "noise, attention and recall of real and imaginary heads; curves of encodings",
    "import": "make a checkpoint of a published or exported folder",
    "export": "make a folder of a model: an ordinary Llama, or in the published format",
    "convert": "give a model more attention heads without changing what it computes",
    "results": "table of finished runs",
    "sweep": "run variants and seeds, survive anything, report",
    "pipeline": "run stages of training one after another: pre-training, decay, longer contexts",
    "checkpoint": "inspect a checkpoint, or make one file of a sharded one",
    "estimate": "memory, hours and disk of a training run before it starts",
    "probe": "what this machine can do: device, bfloat16, compiler",
}
# Of `ropepp.commands`, where they have other names.
MODULES = dict.fromkeys(("validate", "test", "predict"), "fit")
MODULES |= {"import": "import_model", "export": "export_model"}
USAGE = """\
usage: ropepp COMMAND ...

Train and compare RoPE, RoPE++ and other position encodings for language models.

{}

ropepp COMMAND --help explains each. --debug anywhere shows the traceback of an error.
--trust MODULE before COMMAND imports a module of yours with encodings, optimizers or schedules.
""".format("\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code, 2 with a line on standard error for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    modules = [name for name in os.environ.get(TRUST, "").split(",") if name]
    while args[:1] == ["--trust"] and len(args) > 1:
        modules += [args[1]] if args[1] not in modules else []
        args = args[2:]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from ropepp import __version__

        print(f"ropepp {__version__}")
        return 0
    if args[0] not in COMMANDS:
        _say(f"error: unknown command {args[0]!r}; allowed: {', '.join(COMMANDS)}")
        return 2
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whose file was exchanged
            if isinstance(stream, TextIOWrapper):  # names of files may be no Unicode text
                stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line
    try:
        _import_trusted(modules)
        module = MODULES.get(args[0], args[0])
        command = importlib.import_module(f"ropepp.commands.{module}")
        # Lightning's subcommands are told apart by their name.
        if module == "fit":  # whose checkpoints are found again by their own rules
            command.main(args)
        else:
            with one_command():
                command.main(args[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # Nothing is left to say; the interpreter's own flush at its end would complain.
        for stream in (sys.stdout, sys.stderr):
            to_nowhere(stream)
        return 128 + signal.SIGPIPE
    except Stopped as stop:
        _ends(argv)
        _say(stop)
        return stop.code
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into an exit with 1, or fails while it cleans up.
        if any(isinstance(one, KeyboardInterrupt) for one in causes(error)):
            _ends(argv)
            _say("interrupted before it was done")
            return 130
        if isinstance(error, SystemExit):
            raise
        message = user_message(error)
        if debug or message is None:
            raise
        _say(f"error: {message}")
        return 2
    return 0


def _say(text: object) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr)


def _ends(argv: list[str] | None) -> None:
    """Whoever asks once more does not change how a process ends that is at its end."""
    if argv is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _import_trusted(modules: list[str]) -> None:
    """Imports the user's own modules, here and in the processes that this one starts."""
    if not modules:
        return
    os.environ[TRUST] = ",".join(modules)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            found = f"there is no module {error.name} here or in the environment"
            raise InputError(f"--trust is {name!r}; {found}") from error


def _reader_is_gone() -> bool:
    """Whether what reads standard output has ended, as `head` does."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
