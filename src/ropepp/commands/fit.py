"""``ropepp fit``, ``validate``, ``test`` and ``predict``."""

import os

from ropepp.runs.survival import end_with_starter


def main(args: list[str]) -> None:
    """Runs one of Lightning's subcommands; ``args`` begins with its name."""
    end_with_starter()
    # Threads that spin for long while they wait make a step many times slower as soon as anything
    # else runs on the same cores; a short spin costs nothing. Read when torch is first loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Batches of other lengths (validation, longer contexts) would otherwise leave GPU memory in
    # pieces that fit nothing. Read when the GPU is first used; a choice under either name stays.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from ropepp.train.lightning_cli import main as run

    run(args)
