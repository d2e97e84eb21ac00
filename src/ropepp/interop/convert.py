"""Upcycling: a model with more attention heads and the same function."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ropepp.errors import InputError
from ropepp.interop.saved import SavedModel, open_model, write_checkpoint
from ropepp.model.folders.published import SPECS, own_position
from ropepp.model.plain import from_plain
from ropepp.model.positions import Position, RoPE
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import read_metadata
from ropepp.runs.settings import read_settings
from ropepp.train.weights import load_optimizer_from, load_weights


def convert(source: str | Path, file: Path, position: Path) -> tuple[SavedModel, Transformer, bool]:
    """Writes a checkpoint at step 0 of a model that computes what another does and has more
    attention heads: what they add is zero until their columns of the output projection are trained.

    The optimizer's moments go along, if ``source`` has them in one file; those of the output
    projections begin anew, step count included.

    Args:
        source: See `ropepp.interop.saved.open_model`.
        file: The new checkpoint, complete or absent.
        position: A YAML file with a position encoding. What it leaves out of theta, rotary_share
            and scaling is the source's.

    Returns:
        The source, the new model, and whether there were moments.

    Raises:
        InputError: The function would not stay; says what would be lost.
    """
    saved = open_model(source)
    spec = wanted_position(position, saved)
    config = saved.model.config
    with torch.device("meta"):
        network = Transformer(config, spec, ignore_index=saved.model.ignore_index)
    try:
        network.layout.places_of(saved.model.layout)
    except InputError as error:
        raise InputError(f"{position}: {error}") from error
    network.to_empty(device="cpu")
    network.tie()
    load_weights(network, saved.path)
    content = read_metadata(saved.path) if saved.path.is_file() else {}
    states: list[dict[str, Any]] = []
    if content.get("optimizer_states"):
        optimizer = from_plain(content["hyper_parameters"]["optimizer"]).build(network)
        load_optimizer_from(nn.ModuleDict({"network": network}), optimizer, saved.path)
        states = [optimizer.state_dict()]
    write_checkpoint(file, network, saved.tokenizers, states)
    return saved, network, bool(states)


def wanted_position(file: Path, saved: SavedModel) -> Position:
    """The position encoding of a YAML file, whose rotation is that of a saved model.

    Raises:
        InputError: It is none, or rotates otherwise.
    """
    source, content = saved.model.position, _full(read_settings(file))
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise InputError(f"{file} is no position encoding: it needs class_path and init_args")
    try:
        spec = own_position(content)
        if not isinstance(source, RoPE) or not isinstance(spec, RoPE):
            raise InputError(
                f"{file} is {spec}, the model of {saved.path} has {source}: heads can be added "
                "where both rotate as RoPE does"
            )
        shared = {field.name: getattr(source, field.name) for field in fields(RoPE)}
        stated = content["init_args"]
        spec = replace(spec, **{key: x for key, x in shared.items() if key not in stated})
    except TypeError as error:  # an argument that the class has not, or of another type
        raise InputError(f"{file}: {error}") from error
    for key, value in shared.items():
        if getattr(spec, key) != value:
            raise InputError(
                f"{file}: {key} is {getattr(spec, key)}, in the model of {saved.path} it is "
                f"{value}: all scores would change; leave it out or give that value"
            )
    return spec


def _full(content: Any) -> Any:
    """Specs by their short names as `to_plain` writes them."""
    if not isinstance(content, dict):
        return content
    out = {key: _full(value) for key, value in content.items()}
    if isinstance(path := out.get("class_path"), str):
        out["class_path"] = path if "." in path else SPECS + path
        out["init_args"] = out.get("init_args") or {}
    return out
