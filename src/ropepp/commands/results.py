"""``ropepp results``."""

from argparse import ArgumentParser


def main(args: list[str]) -> None:
    """Prints the table; ``args`` are those after ``ropepp results``."""
    parser = ArgumentParser("ropepp results", description="Prints a table of finished runs.")
    parser.add_argument(
        "directories", nargs="*", default=["logs"], help="run folders, or folders of runs"
    )
    parser.add_argument(
        "--format", choices=("md", "csv", "json"), default="md",
        help="a table for people, or all values for programs",
    )  # fmt: skip
    options = parser.parse_args(args)
    from ropepp.runs.table import results

    print(results(options.directories, options.format), end="")
