"""Weights to begin a stage with, from whatever form they are in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ropepp.errors import InputError
from ropepp.model.folders.published import check_shapes, load_pretrained
from ropepp.model.init import as_sharded
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import METADATA, read_metadata, shapes


@torch.no_grad()
def load_weights(network: Transformer, path: str | Path) -> None:
    """Copies weights into ``network``, sharded or not.

    Args:
        network: The model; its position may differ from the saved one's (another theta, another
            scaling) as long as its tensors have the same shapes.
        path: A checkpoint file, a sharded checkpoint, or a folder in the published format.

    Raises:
        InputError: There is nothing of that kind, it is torn, or a tensor is missing, left over or
            of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"init_from is {path}, which does not exist")
    own = network.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if path.is_dir() and (path / "config.json").is_file():
        found = load_pretrained(path).state_dict()
        check_shapes(expected, {name: tuple(x.shape) for name, x in found.items()}, path)
        load_tensors(own, found)
        return
    content = read_metadata(path)  # says what is torn
    check_shapes(expected, shapes(path), path)
    wanted = {f"network.{name}": tensor for name, tensor in own.items()}
    if path.is_dir():
        _load_shards({"state_dict": wanted}, path)
    else:
        load_tensors(wanted, content["state_dict"])


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into those of the same names, sharded or not."""
    for name, tensor in own.items():
        tensor.copy_(as_sharded(tensor, found[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores an optimizer over sharded parameters from a state of whole tensors.

    Args:
        optimizer: The optimizer.
        state: What ``state_dict`` of such an optimizer over whole parameters has returned.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    sharded = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        sharded[number] = {
            # A step's number is a tensor too, or a plain one.
            key: as_sharded(parameter, x) if getattr(x, "shape", None) == parameter.shape else x
            for key, x in state["state"].get(number, {}).items()
        }
    optimizer.load_state_dict({**state, "state": sharded})


def load_optimizer_from(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores an optimizer from a checkpoint of a run with the same parameters.

    Args:
        module: What the optimizer's parameters belong to, named as in the checkpoint.
        optimizer: The optimizer, sharded or not; its settings become the saved ones.
        path: A checkpoint, sharded or one file.

    Raises:
        InputError: There is no optimizer's state, or that of another kind of optimizer.
    """
    if path.is_dir() and not (path / METADATA).exists():
        raise InputError(f"{path} has weights alone, no optimizer's state")
    content = read_metadata(path)
    try:
        if path.is_dir():
            states = {"optimizer_0": get_optimizer_state_dict(module, optimizer)}
            _load_shards(states, path)
            set_optimizer_state_dict(module, optimizer, states["optimizer_0"])
        else:
            load_optimizer(optimizer, content["optimizer_states"][0])
    except (KeyError, ValueError, IndexError, CheckpointException) as error:
        raise InputError(f"{path}: its optimizer's state does not fit this one: {error}") from error


def _load_shards(wanted: dict[str, Any], path: Path) -> None:
    """Fills the tensors in ``wanted``; without processes too."""
    dcp.load(wanted, checkpoint_id=path, no_dist=not dist.is_initialized())
