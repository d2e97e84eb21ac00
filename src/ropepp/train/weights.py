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
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import check_shapes, load_pretrained
from ropepp.model.init import as_sharded
from ropepp.model.plain import from_plain
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import METADATA, read_metadata, shapes

MIXER = "self_attn.o_proj.weight"  # what of a layer depends on the number of attention heads


@torch.no_grad()
def load_weights(network: Transformer, path: str | Path) -> None:
    """Copies weights into ``network``, sharded or not.

    Of a model with fewer attention heads, the heads that are new get columns of zeros in the output
    projection: the function stays, see `ropepp.model.heads.HeadLayout.places_of`.

    Args:
        network: The model; its position may differ from the saved one's (another theta, another
            scaling, more attention heads) as long as all else has the same shapes.
        path: A checkpoint file, a sharded checkpoint, or a folder in the published format.

    Raises:
        InputError: There is nothing of that kind, it is torn, or a tensor is missing, left over or
            of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"init_from is {path}, which does not exist")
    own = network.state_dict()
    layout, narrow = network.layout, {}
    saved = load_pretrained(path) if (path / "config.json").is_file() else None
    places = added_heads(network, path, saved)
    if places is not None:
        columns = len(places) * network.config.head_dim
        narrow = {
            name: torch.empty(len(tensor), columns, dtype=tensor.dtype)
            for name, tensor in own.items()
            if name.endswith(MIXER)
        }
    _load_whole(own | narrow, path, saved)
    for name, tensor in narrow.items():
        wide = tensor.new_zeros(len(tensor), layout.num_heads, network.config.head_dim)
        wide[:, places] = tensor.unflatten(1, (len(places or ()), -1))
        own[name].copy_(as_sharded(own[name], wide.flatten(1)))


def added_heads(
    network: Transformer, path: Path, saved: Transformer | None = None
) -> list[int] | None:
    """Where in ``network`` the attention heads of a saved model of the same sizes are; None if it
    has as many, or is of other sizes, which others refuse in words."""
    if saved is not None:  # the model of a folder
        config, spec = saved.config, saved.position
    else:
        settings = read_metadata(path).get("hyper_parameters", {})
        if "network" not in settings:
            return None
        config, spec = ModelConfig(**settings["network"]), from_plain(settings["position"])
    layout = spec.layout(config.num_heads, config.num_kv_heads)
    sizes = [(x.num_heads, x.num_kv_heads, x.head_dim) for x in (config, network.config)]
    if layout.num_heads == network.layout.num_heads or sizes[0] != sizes[1]:
        return None
    try:
        return network.layout.places_of(layout)
    except InputError as error:
        raise InputError(f"{path} is of {spec}: {error}") from error


def _load_whole(own: dict[str, Tensor], path: Path, saved: Transformer | None) -> None:
    """Copies all tensors of a saved model into those of the same names and shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if saved is not None:
        found = saved.state_dict()
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
            state = content["optimizer_states"][0]
            network = module.get_submodule("network")
            assert isinstance(network, Transformer)
            if added_heads(network, path) is not None:
                state = _without_mixers(network, optimizer, content)
            load_optimizer(optimizer, state)
    except (KeyError, ValueError, IndexError, CheckpointException) as error:
        raise InputError(f"{path}: its optimizer's state does not fit this one: {error}") from error


def _without_mixers(
    network: Transformer, optimizer: torch.optim.Optimizer, content: dict[str, Any]
) -> dict[str, Any]:
    """A checkpoint's optimizer state by the numbers of ``optimizer``, without the output
    projections', which have become wider: theirs begins anew."""
    settings = content["hyper_parameters"]
    with torch.device("meta"):
        source = Transformer(ModelConfig(**settings["network"]), from_plain(settings["position"]))
    before = _names(source, from_plain(settings["optimizer"]).build(source))
    numbers = {name: number for number, name in enumerate(_names(network, optimizer))}
    saved = content["optimizer_states"][0]["state"]
    kept = [name for name in before if not name.endswith(MIXER)]
    state = {numbers[x]: saved[before.index(x)] for x in kept if before.index(x) in saved}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _names(network: Transformer, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names, in the order of an optimizer's numbers."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _load_shards(wanted: dict[str, Any], path: Path) -> None:
    """Fills the tensors in ``wanted``; without processes too."""
    dcp.load(wanted, checkpoint_id=path, no_dist=not dist.is_initialized())
