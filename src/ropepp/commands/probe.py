"""``ropepp probe``."""

import json
from dataclasses import asdict


def main(args: list[str]) -> None:
    """Prints what this machine can do; there are no options."""
    from ropepp.runs.machine import probe

    print(json.dumps(asdict(probe()), indent=2))
