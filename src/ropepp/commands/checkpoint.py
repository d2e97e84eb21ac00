"""``ropepp checkpoint``."""

from pathlib import Path

from ropepp.files import require_free, require_writable
from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Runs a command; ``args`` are those after ``ropepp checkpoint``."""
    parser = Parser("ropepp checkpoint", description="Looks at or converts checkpoints.")
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
        require_free(options.file)
        require_writable(options.file)
        checkpoints.consolidate(options.directory, options.file)
        print(f"written to {options.file}")
