"""``ropepp probe``."""

import json

from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Prints what this machine can do; there are no options."""
    Parser("ropepp probe", description="Prints what this machine can do.").parse_args(args)
    from ropepp.runs.machine import probe

    print(json.dumps(probe(), indent=2))
