"""Upcycling: a model with more attention heads and the same function."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.interop.saved import SavedModel, open_model, write_checkpoint
from ropepp.model.folders.published import SPECS, own_position
from ropepp.model.plain import understanding
from ropepp.model.positions import Position, RoPE
from ropepp.model.transformer import Transformer
from ropepp.runs.settings import read_settings
from ropepp.train.weights import load_weights, places_of


def convert(source: str | Path, file: Path, position: Path) -> tuple[SavedModel, Transformer]:
    """Writes a checkpoint at step 0 of a model with more attention heads, whose columns of the
    output projection are zero. ``source`` is what `open_model` opens, ``position`` a YAML file with
    a position encoding; what it leaves out of theta, rotary_share and scaling is the source's.
    Returns source and new model. An `InputError` says what would be lost of the function."""
    saved = open_model(source)
    spec = wanted_position(position, saved)
    with understanding(position):
        network = Transformer(saved.model.config, spec, ignore_index=saved.model.ignore_index)
        places_of(network.layout, saved.model.layout)
    load_weights(network, saved.path)
    write_checkpoint(file, network, saved.tokenizers, saved.text)
    return saved, network


def wanted_position(file: Path, saved: SavedModel) -> Position:
    """The position encoding of a YAML file, which rotates as a saved model does."""
    source, content = saved.model.position, _full(read_settings(file))
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise InputError(f"{file} is no position encoding: it needs class_path and init_args")
    with understanding(file):
        spec = own_position(content)
    if not isinstance(source, RoPE) or not isinstance(spec, RoPE):
        raise InputError(
            f"{file} is {spec}, the model of {saved.path} has {source}: heads can be added where "
            "both rotate as RoPE does"
        )
    shared = {field.name: getattr(source, field.name) for field in fields(RoPE)}
    left_out = {key: x for key, x in shared.items() if key not in content["init_args"]}
    spec = replace(spec, **left_out)
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
        out["class_path"] = path if "." in path else f"{SPECS}.{path}"
        out["init_args"] = out.get("init_args") or {}
    return out
