"""``ropepp checkpoint``."""

from argparse import ArgumentParser
from pathlib import Path


def main(args: list[str]) -> None:
    """Runs a command; ``args`` are those after ``ropepp checkpoint``."""
    parser = ArgumentParser("ropepp checkpoint", description="Looks at or converts checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="step, tokens, variant, sizes, complete or torn")
    inspect.add_argument("path", type=Path, help="a checkpoint, or a folder of them")
    inspect.add_argument("--json", action="store_true", help="everything, for programs")
    whole = commands.add_parser("consolidate", help="one file of a sharded checkpoint")
    whole.add_argument("directory", type=Path)
    whole.add_argument("file", type=Path)
    options = parser.parse_args(args)
    from ropepp.runs import checkpoints

    if options.command == "inspect":
        print(checkpoints.inspect(options.path, as_json=options.json))
    else:
        checkpoints.consolidate(options.directory, options.file)
        print(f"written to {options.file}")
