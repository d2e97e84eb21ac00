"""``ropepp probe``."""

import json


def main(args: list[str]) -> None:
    """Prints what this machine can do; there are no options."""
    from ropepp.runs.machine import probe

    print(json.dumps(probe(), indent=2))
