"""Weights to begin a stage with, from whatever form they are in, and optimizers' states."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import check_shapes, load_pretrained
from ropepp.model.heads import HeadLayout
from ropepp.model.init import as_sharded
from ropepp.model.plain import from_plain, understanding
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import METADATA, read_checkpoint, shapes
from ropepp.runs.shards import load_shards
from ropepp.train.optim import state_of

MIXER = "self_attn.o_proj.weight"  # what of a layer depends on the number of attention heads


@torch.no_grad()
def load_weights(
    network: Transformer, path: str | Path, content: dict[str, Any] | None = None
) -> None:
    """Copies weights into ``network``, sharded or not, from a checkpoint of one file or sharded,
    whose ``content`` may have been read already, or from a folder in the published format. The
    position may differ (another theta, another scaling, more attention heads) as long as all else
    has the same shapes; an `InputError` names what is damaged or does not fit. Heads that are new
    get columns of zeros in the output projection, so that the function stays."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"init_from is {path}, which does not exist")
    own = network.state_dict()
    layout, narrow = network.layout, {}
    saved: Any = load_pretrained(path) if (path / "config.json").is_file() else content
    if saved is None:
        saved = read_checkpoint(path, "state_dict")
    places = added_heads(network, path, saved)
    if places is not None:
        columns = len(places) * network.config.head_dim
        narrow = {
            name: torch.empty(len(tensor), columns, dtype=tensor.dtype)
            for name, tensor in own.items()
            if name.endswith(MIXER)
        }
    load_whole(own | narrow, path, saved)
    for name, tensor in narrow.items():
        wide = tensor.new_zeros(len(tensor), layout.num_heads, network.config.head_dim)
        wide[:, places] = tensor.unflatten(1, (len(places or ()), -1))
        own[name].copy_(as_sharded(own[name], wide.flatten(1)))


def added_heads(network: Transformer, path: Path, saved: Any) -> list[int] | None:
    """Where in ``network`` the attention heads of a saved model of the same sizes are; None if it
    has as many, or other sizes. ``saved`` is the model, or what a checkpoint holds."""
    if isinstance(saved, Transformer):
        config, spec = saved.config, saved.position
    else:
        settings = saved.get("hyper_parameters") or {}
        if "network" not in settings:
            return None
        with understanding(path):
            config, spec = ModelConfig(**settings["network"]), from_plain(settings["position"])
    sizes = [(x.num_heads, x.num_kv_heads, x.head_dim) for x in (config, network.config)]
    with understanding(f"{path} is of {spec}"):
        layout = spec.layout(config.num_heads, config.num_kv_heads)
        if layout.num_heads == network.layout.num_heads or sizes[0] != sizes[1]:
            if sizes[0] == sizes[1] and layout.heads != network.layout.heads:
                warnings.warn(
                    f"{path} is of {spec}: its weights compute another function in"
                    f" {network.position}",
                    stacklevel=2,
                )
            return None
        return places_of(network.layout, layout)


def places_of(layout: HeadLayout, other: HeadLayout) -> list[int]:
    """Which of a layout's heads each of another's is: of the same projection, phase and kv head.
    An `InputError` if one is not there, or there are more projections or kv heads."""
    free = [(head.projection, head.phase % 360, head.kv_head) for head in layout.heads]
    places: list[int] = []
    for head in other.heads:
        key = (head.projection, head.phase % 360, head.kv_head)
        if key not in free:
            raise InputError(
                f"of {other.num_heads} attention heads not all are among the new "
                f"{layout.num_heads}, so what they add would be lost: the first has projection "
                f"{head.projection}, phase {head.phase:g} degrees, kv head {head.kv_head}"
            )
        places.append(free.index(key))
        free[places[-1]] = (-1, 0.0, -1)
    counts = [(x.num_projections, x.num_kv_heads) for x in (other, layout)]
    if counts[0] != counts[1]:
        raise InputError(
            f"there are {counts[0][0]} query projections and {counts[0][1]} kv heads, and "
            f"{counts[1][0]} and {counts[1][1]} are needed: only heads can be added"
        )
    return places


@torch.no_grad()
def load_whole(own: dict[str, Tensor], path: Path, saved: Any) -> None:
    """Copies the tensors of a saved model, or of a checkpoint's content, into those of the same
    names and shapes, sharded or not; refuses others."""
    if isinstance(saved, Transformer):
        prefix, found = "", saved.state_dict()
        check_shapes(own, {name: tuple(x.shape) for name, x in found.items()}, path)
    else:
        prefix, found = "network.", saved.get("state_dict", {})
        check_shapes(own, shapes(path, saved), path)
        if path.is_dir():
            load_shards({"state_dict": {prefix + name: x for name, x in own.items()}}, path)
            return
    for name, tensor in own.items():
        tensor.copy_(as_sharded(tensor, found[prefix + name]))


def load_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Any, path: Path | str
) -> None:
    """Restores an optimizer over parameters of ``module``, sharded or not, from the state dict of
    one over whole parameters, which is from ``path``; an `InputError` if it is none."""
    check_optimizer(module, optimizer, state, path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        number: {
            # A step's number is a tensor too, or a plain one.
            key: as_sharded(parameter, x) if getattr(x, "shape", None) == parameter.shape else x
            for key, x in state["state"].get(number, {}).items()
        }
        for number, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({**state, "state": sharded})


def check_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Any, path: Path | str
) -> None:
    """Refuses what the optimizer cannot use and names the tensor: fused ones write blindly."""
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
    """Restores an optimizer, sharded or not, with the settings of the checkpoint ``path``, sharded
    or one file. An `InputError` if that has no optimizer's state, or one of another kind."""
    if path.is_dir() and not (path / METADATA).exists():
        raise InputError(f"{path} has weights alone, no optimizer's state")
    if path.is_dir():
        load_optimizer_shards(module, optimizer, path)
        return
    content = read_checkpoint(path, "optimizer_states", mapped=False)
    state = (content.get("optimizer_states") or [None])[0]
    network = getattr(module, "network", module)
    assert isinstance(network, Transformer)
    if state is not None and added_heads(network, path, content) is not None:
        with understanding(f"{path}: its optimizer's state does not fit this one"):
            state = _without_mixers(network, optimizer, content)
    load_optimizer(module, optimizer, state, path)


def _without_mixers(
    network: Transformer, optimizer: torch.optim.Optimizer, content: dict[str, Any]
) -> dict[str, Any]:
    """A checkpoint's state by the numbers of ``optimizer``, without the widened projections'."""
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


def load_optimizer_shards(module: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores an optimizer, over sharded parameters or not, from a sharded checkpoint."""
    key = "optimizer_0"
    with understanding(f"{path}: its optimizer's state does not fit this one"):
        states = {key: dcp.get_optimizer_state_dict(module, optimizer)}
        load_shards(states, path)
        dcp.set_optimizer_state_dict(module, optimizer, states[key])
