"""The ``ropepp`` command. Each subcommand imports what it needs, so that help and small tools start
at once."""

import os
import sys

from ropepp.errors import InputError, Stopped

USAGE = """\
usage: ropepp COMMAND ...

Train and compare RoPE, RoPE++ and other position encodings for language models.

  prepare      make token files from text
  corpus       inspect token files, or compare them with their checksums
  fit          train a model
  validate     loss and perplexity of a checkpoint on the validation split
  test         the same under the name test
  predict      negative log-likelihood of every token, written to files
  generate     continue prompts
  evaluate     perplexity, short tasks, RULER and BABILong of one or many models in one table
  analyze      noise, attention and recall of real and imaginary heads; curves of encodings
  import       make a checkpoint of a published or exported folder
  export       make a folder of a model, for transformers or in the published format
  results      table of finished runs
  sweep        run variants and seeds, survive anything, report
  pipeline     run stages of training one after another: pre-training, decay, longer contexts
  checkpoint   inspect a checkpoint, or make one file of a sharded one
  estimate     memory, hours and disk of a training run before it starts
  probe        what this machine can do: device, bfloat16, compiler

ropepp COMMAND --help explains each. --debug anywhere shows the traceback of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 with one line on standard error for bad
    input."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from ropepp import __version__

        print(f"ropepp {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(
            f"error: unknown command {args[0]!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    try:
        COMMANDS[args[0]](args)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except Exception as error:
        message = user_message(error)
        if debug or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


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
    cause = cause if isinstance(cause, InputError) else None
    # Lightning's own exception for a configuration that cannot be, imported if it was raised.
    misconfigured = type(error).__name__ == "MisconfigurationException"
    if cause is None and not isinstance(error, ArgumentError) and not misconfigured:
        return None
    return " ".join(str(cause or error).split())


def _train(args: list[str]) -> None:
    # Threads that spin for long while they wait make a step many times slower as soon as anything
    # else runs on the same cores; a short spin costs nothing. Read when torch is first loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from ropepp.train.lightning_cli import main as run

    run(args)


def _prepare(args: list[str]) -> None:
    from jsonargparse import auto_cli

    from ropepp.data.prepare import prepare

    auto_cli(prepare, args=args[1:], exit_on_error=False)


def _corpus(args: list[str]) -> None:
    from ropepp.data.inspect import main as run

    run(args[1:])


def _generate(args: list[str]) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from ropepp.generate.cli import main as run

    run(args[1:])


def _evaluate(args: list[str]) -> None:
    from ropepp.eval.evaluate import main as run

    run(args[1:])


def _analyze(args: list[str]) -> None:
    from ropepp.eval.analyze import main as run

    run(args[1:])


def _import(args: list[str]) -> None:
    from ropepp.interop.cli import import_main

    import_main(args[1:])


def _export(args: list[str]) -> None:
    from ropepp.interop.cli import export_main

    export_main(args[1:])


def _results(args: list[str]) -> None:
    from argparse import ArgumentParser

    from ropepp.results import results

    parser = ArgumentParser("ropepp results", description="Prints a table of finished runs.")
    parser.add_argument(
        "directories", nargs="*", default=["logs"], help="run folders, or folders of runs"
    )
    print(results(parser.parse_args(args[1:]).directories), end="")


def _checkpoint(args: list[str]) -> None:
    from argparse import ArgumentParser
    from pathlib import Path

    parser = ArgumentParser("ropepp checkpoint", description="Looks at or converts checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="step, tokens, variant, sizes, complete or torn")
    inspect.add_argument("path", type=Path, help="a checkpoint, or a folder of them")
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    whole = commands.add_parser("consolidate", help="one file of a sharded checkpoint")
    whole.add_argument("directory", type=Path)
    whole.add_argument("file", type=Path)
    options = parser.parse_args(args[1:])
    from ropepp.train import checkpoints

    if options.command == "inspect":
        print(checkpoints.inspect(options.path, as_json=options.json))
    else:
        checkpoints.consolidate(options.directory, options.file)
        print(f"written to {options.file}")


def _estimate(args: list[str]) -> None:
    from ropepp.train.estimate import main as run

    run(args[1:])


def _sweep(args: list[str]) -> None:
    from ropepp.sweep.cli import main as run

    run(args[1:])


def _pipeline(args: list[str]) -> None:
    from ropepp.pipeline import main as run

    run(args[1:])


def _probe(args: list[str]) -> None:
    import json
    from dataclasses import asdict

    from ropepp.train.machine import probe

    print(json.dumps(asdict(probe()), indent=2))


COMMANDS = {
    "prepare": _prepare,
    "corpus": _corpus,
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _train,
    "generate": _generate,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "import": _import,
    "export": _export,
    "results": _results,
    "sweep": _sweep,
    "pipeline": _pipeline,
    "checkpoint": _checkpoint,
    "estimate": _estimate,
    "probe": _probe,
}


if __name__ == "__main__":
    sys.exit(main())
