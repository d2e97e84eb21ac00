"""``ropepp corpus inspect|verify FOLDER``."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str]) -> None:
    """The command `ropepp corpus`; `args` are what follows it."""
    parser = ArgumentParser("ropepp corpus", description="Looks at prepared corpora.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "counts, lengths and the first documents"),
        ("verify", "compare all files with their checksums"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", type=Path, help="made by `ropepp prepare`")
    options = parser.parse_args(args)
    from ropepp.data.prepare.inspect import inspect, verify

    print((inspect if options.command == "inspect" else verify)(options.folder), end="")
