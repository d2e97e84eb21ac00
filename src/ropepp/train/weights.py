"""Weights to begin a stage with, from whatever form they are in, and optimizers' states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ropepp.errors import InputError
from ropepp.model.folders.published import check_shapes, load_pretrained
from ropepp.model.init import as_sharded
from ropepp.model.plain import understanding
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import METADATA, read_checkpoint, shapes
from ropepp.runs.shards import load_shards
from ropepp.train.optim import state_of


@torch.no_grad()
def load_weights(
    network: Transformer, path: str | Path, content: dict[str, Any] | None = None
) -> None:
    """Copies weights into ``network``, sharded or not.

    Args:
        network: The model; its position may differ from the saved one's (another theta, another
            scaling) as long as its tensors have the same shapes.
        path: A checkpoint file, a sharded checkpoint, or a folder in the published format.
        content: What `read_checkpoint` gave of a checkpoint, if it was read already.

    Raises:
        InputError: There is nothing of that kind, it is damaged, or a tensor is missing, left over
            or of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"init_from is {path}, which does not exist")
    own = network.state_dict()
    if path.is_dir() and (path / "config.json").is_file():
        found = load_pretrained(path).state_dict()
        check_weights(own, {name: tuple(x.shape) for name, x in found.items()}, path)
        load_tensors(own, found)
        return
    content = content or read_checkpoint(path, "state_dict")
    check_weights(own, shapes(path, content), path)
    wanted = {f"network.{name}": tensor for name, tensor in own.items()}
    if path.is_dir():
        load_shards({"state_dict": wanted}, path)
    else:
        load_tensors(wanted, content["state_dict"])


def check_weights(
    own: Mapping[str, Tensor], found: dict[str, tuple[int, ...]], path: Path | str
) -> None:
    """Raises an `InputError` if the shapes ``found`` at ``path`` are not those of a model's
    tensors."""
    check_shapes({name: tuple(x.shape) for name, x in own.items()}, found, Path(path))


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into those of the same names, sharded or not."""
    for name, tensor in own.items():
        tensor.copy_(as_sharded(tensor, found[name]))


def load_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Any, path: Path | str
) -> None:
    """Restores an optimizer, over sharded parameters or not, from a state of whole tensors.

    Args:
        module: What the parameters belong to.
        optimizer: The optimizer.
        state: What ``state_dict`` of such an optimizer over whole parameters has returned.
        path: Where it is from, for messages.

    Raises:
        InputError: It is no such state.
    """
    check_optimizer(module, optimizer, state, path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {}
    for number, parameter in enumerate(parameters):
        sharded[number] = {
            # A step's number is a tensor too, or a plain one.
            key: as_sharded(parameter, x) if getattr(x, "shape", None) == parameter.shape else x
            for key, x in state["state"].get(number, {}).items()
        }
    optimizer.load_state_dict({**state, "state": sharded})


def check_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Any, path: Path | str
) -> None:
    """Refuses a state that the optimizer could not use: fused ones write where they were told
    to.

    Raises:
        InputError: It is no state of such an optimizer over these parameters; names the tensor.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    with understanding(f"{path}: its optimizer's state does not fit this one"):
        sizes = [
            [len(group["params"]) for group in groups]
            for groups in (state["param_groups"], optimizer.param_groups)
        ]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if sizes[0] != sizes[1] or numbers != list(range(len(numbers))):
            raise InputError(f"groups of {sizes[0]} parameters instead of {sizes[1]}")
        parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for number, own in state["state"].items():
            parameter, group = parameters[number]
            expected = state_of(optimizer, group, parameter)
            if not own or expected is None:
                continue
            for key in {**own, **expected}:
                found, shape = own.get(key), expected.get(key)
                plain = isinstance(found, Tensor) and found.layout == torch.strided
                if not plain or not found.is_floating_point() or tuple(found.shape) != shape:
                    is_one = tuple(found.shape) if plain else type(found).__name__
                    name = names.get(parameter, number)
                    raise InputError(f"{key} of {name!r} is {is_one}; expected {shape}")


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
    if path.is_dir():
        load_optimizer_shards(module, optimizer, path)
        return
    content = read_checkpoint(path, "optimizer_states", mapped=False)
    states = content.get("optimizer_states") or [None]
    load_optimizer(module, optimizer, states[0], path)


def load_model_shards(module: nn.Module, path: Path) -> None:
    """Restores a module's sharded parameters."""
    state = {"state_dict": get_model_state_dict(module)}
    load_shards(state, path)


def load_optimizer_shards(
    module: nn.Module, optimizer: torch.optim.Optimizer, path: Path, index: int = 0
) -> None:
    """Restores an optimizer, over sharded parameters or not, from a sharded checkpoint."""
    key = f"optimizer_{index}"
    with understanding(f"{path}: its optimizer's state does not fit this one"):
        states = {key: get_optimizer_state_dict(module, optimizer)}
        load_shards(states, path)
        set_optimizer_state_dict(module, optimizer, states[key])
