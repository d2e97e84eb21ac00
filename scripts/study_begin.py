"""A run of a study that begins with the weights of an earlier one: of the same seed of this row."""

import sys
from pathlib import Path

import warm

if __name__ == "__main__":
    socket, row, *arguments = sys.argv[1:]
    flag = "--seed_everything="
    seed = next(x.removeprefix(flag) for x in arguments if x.startswith(flag))
    found = max(Path(row, f"seed-{seed}", "checkpoints").glob("step-*.ckpt"), default=None)
    if found is None:
        sys.exit(f"error: {row}/seed-{seed} has no checkpoint to begin with")
    sys.exit(warm.run(socket, ["-m", "ropepp.cli", "fit", *arguments, f"--init_from={found}"]))
