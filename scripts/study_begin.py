"""A run of a study that begins with the weights of an earlier one: of the same seed of this row."""

import sys
from pathlib import Path

import warm

if __name__ == "__main__":
    socket, row, *arguments = sys.argv[1:]
    flag = "--seed_everything="
    seed = next(x.removeprefix(flag) for x in arguments if x.startswith(flag))
    found = Path(row) / f"seed-{seed}"
    sys.exit(warm.run(socket, ["-m", "ropepp.cli", "fit", *arguments, f"--init_from={found}"]))
