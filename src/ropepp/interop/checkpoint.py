"""Models in: a folder of weights as one checkpoint file of the form that runs have."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ropepp.errors import InputError
from ropepp.files import replacing_file
from ropepp.model.folders.published import load_pretrained
from ropepp.model.plain import to_plain


def import_checkpoint(folder: str | Path, file: str | Path) -> dict[str, Any]:
    """Writes a checkpoint at step 0, with no optimizer's state, from a folder that
    `load_pretrained` reads.

    Args:
        folder: What to read.
        file: The new file, complete or absent.

    Returns:
        Its hyperparameters: those of the network.

    Raises:
        InputError: ``file`` exists, or the folder cannot be read.
    """
    file = Path(file)
    if file.exists():
        raise InputError(f"{file} exists; choose another name")
    network = load_pretrained(folder)
    # What training had besides is unknown, so that nothing can contradict a run that takes this.
    settings = {"network": asdict(network.config), "position": to_plain(network.position)}
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {f"network.{name}": x for name, x in network.state_dict().items()},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": settings,
        # For whoever opens the file; training takes its targets from the data.
        "ignore_index": network.ignore_index,
    }
    with replacing_file(file) as out:
        torch.save(content, out)
    return settings
