"""A run of a study that begins with the weights of an earlier one: of the same seed of this row."""

import json
import sys
from pathlib import Path

import warm


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's last step; a SystemExit if it has not ended or that one is gone."""
    result = run / "result.json"
    if not result.is_file():
        sys.exit(f"error: {run} has no {result.name}: it has not ended")
    steps = json.loads(result.read_text())["steps"]
    found = max((run / "checkpoints").glob("step-*.ckpt"), default=None)
    if found is None or int(found.stem.removeprefix("step-")) != steps:
        sys.exit(f"error: {run} ended at step {steps}; its newest checkpoint is {found or 'none'}")
    return found


if __name__ == "__main__":
    socket, row, *arguments = sys.argv[1:]
    flag = "--seed_everything="
    seed = next(x.removeprefix(flag) for x in arguments if x.startswith(flag))
    init = f"--init_from={last_checkpoint(Path(row, f'seed-{seed}'))}"
    sys.exit(warm.run(socket, ["-m", "ropepp.cli", "fit", *arguments, init]))
