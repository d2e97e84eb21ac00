"""``ropepp results``."""

from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Prints the table; ``args`` are those after ``ropepp results``."""
    parser = Parser("ropepp results", description="Prints a table of finished runs.")
    add = parser.add_argument
    add("directories", nargs="*", default=["logs"], help="run folders, or folders of runs")
    add("--format", choices=("md", "csv", "json"), default="md",
        help="a table for people, or all values for programs")  # fmt: skip
    options = parser.parse_args(args)
    from ropepp.runs.table import results

    print(results(options.directories, options.format), end="")
