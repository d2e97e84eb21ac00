"""Checkpoints on disk: which there are, whether they are whole, what they hold.

Single processes and DDP write a file ``step-N.ckpt``; FSDP2 writes a folder of that name, with the
shards of each process, an index (``.metadata``) and everything else (``meta.pt``).
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ropepp.checksums import Damaged, archive_sums
from ropepp.errors import InputError, at_least
from ropepp.files import require_free
from ropepp.model.folders.published import read_settings
from ropepp.model.plain import require_plain, understanding
from ropepp.runs.archives import check_tensors, named_tensors, read_archive, write_archive
from ropepp.runs.shards import read_index, read_shards
from ropepp.runs.status import CHECKPOINT, list_checkpoints

METADATA = "meta.pt"
TOKENIZERS = "ropepp_tokenizers"  # key of config.json, and of checkpoints without a data module's
DATA = "CorpusDataModule"  # the name by which Lightning keeps the data module's state
KINDS = {  # what stands in a checkpoint, if it does
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "loops": dict,
    DATA: dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    TOKENIZERS: list,
    "global_step": int,
    "epoch": int,
    "ignore_index": int,
}

T = TypeVar("T")


def newest_complete(directory: Path) -> Path | None:
    """The newest checkpoint that is whole by its structure, with warnings about newer ones."""
    for path in reversed(list_checkpoints(directory)):
        reason = torn(path)
        if reason is None:
            return path
        warnings.warn(f"{path} is torn and left out: {reason}", stacklevel=2)
    return None


def first_whole(path: Path, load: Callable[[Path], T]) -> T:
    """Loads a checkpoint or, where it is damaged, the newest whole one before it in its folder,
    with a warning; raises `Damaged` as ``load`` does if all of them are."""
    older = [one for one in list_checkpoints(path.parent) if one.name < path.name]
    for following in reversed(older):
        try:
            return load(path)
        except Damaged as error:
            warnings.warn(f"{error}; trying {following}", stacklevel=2)
            path = following
    return load(path)


def torn(path: Path) -> str | None:
    """Why a checkpoint cannot be read, judged by all of it but its tensors; None if it is whole; an
    `InputError` if there is none."""
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        if path.is_dir():
            _require_shards(path)
        archive_sums(path / METADATA if path.is_dir() else path, path)
    except InputError as error:
        # The caller names the checkpoint.
        return str(error).removeprefix(f"{path} is damaged: ").replace(f"{path}/", "")
    return None


def _require_shards(path: Path) -> None:
    if not (path / METADATA).is_file():
        raise Damaged(f"{METADATA} is missing")
    ends: dict[str, int] = {}
    for part in read_index(path).storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else -1
        if size < end:
            found = "missing" if size < 0 else f"{size} bytes long instead of {end}"
            raise Damaged(f"{name} is {found}")


def read_checkpoint(path: Path, *used: str, mapped: bool = True) -> dict[str, Any]:
    """Everything in a checkpoint but a sharded one's tensors. Tensors under the keys ``used`` are
    compared with their checksums; of the others only names and shapes may be used. If ``mapped``,
    tensors stay in the file until they are used. `Damaged` if something is torn or not what was
    written; an `InputError` if there is none, or it holds what does not stand in a checkpoint."""
    if reason := torn(path):
        raise Damaged(f"checkpoint {path} is torn: {reason}")
    file = path / METADATA if path.is_dir() else path
    content, sums = read_archive(file, file, mapped)
    with understanding(file):
        _require_kinds(content)
        named, step = CHECKPOINT.fullmatch(path.name), content.get("global_step", 0)
        if named and step != int(named[1]):
            warnings.warn(f"{path} is a checkpoint of step {step}, whatever its name", stacklevel=2)
        parts = content if path.is_dir() else {key: content[key] for key in used if key in content}
        check_tensors(named_tensors(parts), sums, file)
    return content


def _require_kinds(content: Any) -> None:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError("it holds no keys and values")
    for key, kind in KINDS.items():
        value = content.get(key, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    for key in ("global_step", "epoch"):
        at_least(0, **{key: content.get(key)})
    for key in ("hyper_parameters", TOKENIZERS, "global_step", "epoch"):
        require_plain(content.get(key), key)
    for name, tensor in content.get("state_dict", {}).items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        real = dense and not tensor.is_meta and tensor.is_floating_point()
        if not real or not tensor.is_contiguous():
            raise InputError(f"state_dict: {name!r:.200} is no plain tensor of numbers")


def tokenizers(path: Path, content: dict[str, Any] | None = None) -> tuple[str, ...]:
    """Fingerprints of the tokenizer that the weights of a checkpoint, or of a folder with
    ``config.json``, go with, in each form that its file has; none where nothing tells. ``content``
    is what is in it, if it was read already."""
    if content is None:
        own = (path / "config.json").is_file()
        content = read_settings(path / "config.json") if own else read_checkpoint(path)
    found = [content[DATA].get("tokenizer")] if DATA in content else content.get(TOKENIZERS) or []
    if not isinstance(found, list) or not all(isinstance(x, str | None) for x in found):
        raise InputError(f"{path}: {found!r:.60} are no fingerprints of tokenizers")
    return tuple(filter(None, found))


def shapes(path: Path, content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors in a checkpoint, whose content was read already."""
    if path.is_dir():
        prefix = "state_dict.network."
        found = {
            key: tuple(getattr(entry, "size", ()))
            for key, entry in read_index(path).state_dict_metadata.items()
            if key.startswith(prefix)
        }
    else:
        prefix = "network."
        tensors = content.get("state_dict", {})
        found = {key: tuple(value.shape) for key, value in tensors.items()}
    return {key.removeprefix(prefix): shape for key, shape in found.items()}


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint is: step, tokens, variant, sizes, whether it is whole, bytes on disk; all
    of it is read and compared with its checksums."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    content: dict[str, Any] = {
        "path": str(path),
        "kind": "sharded" if path.is_dir() else "single file",
        "complete": False,
        "torn": torn(path),
        "bytes": sum(file.stat().st_size for file in files),
    }
    if content["torn"] is not None:
        return content
    try:
        with understanding(path):
            metadata = read_checkpoint(path, "state_dict", "optimizer_states")
            if path.is_dir():
                read_shards(path)
            settings = metadata.get("hyper_parameters", {})
            content |= {
                "step": metadata.get("global_step"),
                "tokens": metadata.get("callbacks", {}).get("Metrics", {}).get("tokens"),
                "variant": settings.get("position", {}).get("class_path", "").rpartition(".")[2],
                "parameters": _num_parameters(settings, shapes(path, metadata)),
                "settings": settings,
                "complete": True,
            }
    except InputError as error:
        content["torn"] = str(error)
    return content


def _num_parameters(settings: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> int:
    """Without constants; a tied output layer is the embedding."""
    tied = settings.get("network", {}).get("tied_embeddings", False)
    left_out = ("lm_head.weight",) if tied else ()
    names = (name for name in found if name.endswith(".weight") and name not in left_out)
    return sum(math.prod(found[name]) for name in names)


def inspect(path: Path, as_json: bool = False) -> str:
    """What `describe` finds about a checkpoint or all in a folder, for people or programs; an
    `InputError` if the one that was asked for is damaged."""
    found = [path]
    if path.is_dir() and not (path / METADATA).exists():
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints") or [path]
        if found == [path] and (path / "config.json").is_file():
            raise InputError(f"{path} is a folder of a model, not a checkpoint of a run")
    described = [describe(one) for one in found]
    if as_json:
        return json.dumps(described if len(found) > 1 else described[0], indent=2)
    if len(found) == 1 and described[0]["torn"]:
        raise InputError(f"{path} is torn: {described[0]['torn']}")
    return "\n".join(_line(one) for one in described)


def _line(one: dict[str, Any]) -> str:
    size = f"{one['kind']}, {one['bytes'] / 1e6:,.1f} MB"
    if one["torn"]:
        return f"{one['path']}: TORN ({one['torn']}), {size}"
    network = one["settings"].get("network", {})
    sizes = {key: value for key, value in network.items() if not isinstance(value, dict)}
    shown = ", ".join(f"{key} {value}" for key, value in sizes.items() if value)
    return (
        f"{one['path']}: complete, {size}\n"
        f"  step {one['step'] or 0:,}, {one['tokens'] or 0:,} tokens, {one['variant']}, "
        f"{one['parameters']:,} parameters\n  {shown}"
    )


def consolidate(directory: Path, file: Path) -> None:
    """Writes a sharded checkpoint, the optimizer's state too, as one file from which one process or
    many can go on; an `InputError` if it is no whole sharded one, or ``file`` exists."""
    content = read_checkpoint(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is one file already")
    require_free(file)
    parts = read_shards(directory)
    with understanding(directory):
        content["state_dict"] = parts["state_dict"]
        content["optimizer_states"] = [
            _numbered(state) for key, state in parts.items() if key.startswith("optimizer_")
        ]
    write_archive(content, file)


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by parameter numbers, as optimizers keep it, from one by names."""
    names = chain.from_iterable(group["params"] for group in state["param_groups"])
    numbers = {name: number for number, name in enumerate(names)}
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    by_number = {numbers[name]: values for name, values in state["state"].items()}
    return {"state": dict(sorted(by_number.items())), "param_groups": groups}
