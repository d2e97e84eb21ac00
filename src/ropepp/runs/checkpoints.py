"""Checkpoints on disk: which there are, whether they are whole, what they hold.

Single processes and DDP write a file ``step-N.ckpt``; FSDP2 writes a folder of that name, with the
shards of each process, an index (``.metadata``) and everything else (``meta.pt``).
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ropepp.errors import InputError
from ropepp.files import replacing_file
from ropepp.model.folders.published import read_settings

_NAME = re.compile(r"step-(\d+)\.ckpt")
METADATA = "meta.pt"
TOKENIZERS = "ropepp_tokenizers"  # key of config.json, and of checkpoints without a data module's


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; those still being written have other names."""
    found = [(int(m[1]), p) for p in directory.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_complete(directory: Path) -> Path | None:
    """The newest checkpoint that is whole, with a warning about each newer one that is not."""
    for path in reversed(list_checkpoints(directory)):
        reason = torn(path)
        if reason is None:
            return path
        warnings.warn(f"{path} is torn and left out: {reason}", stacklevel=2)
    return None


def torn(path: Path) -> str | None:
    """Why a checkpoint cannot be read, judged by its structure and sizes; None if it is whole.

    Raises:
        InputError: There is none.
    """
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist")
    if path.is_file():
        return _torn_archive(path)
    for name in (".metadata", METADATA):
        if not (path / name).is_file():
            return f"{name} is missing"
    try:
        index = _index(path)
    except Exception as error:  # a torn pickle raises anything
        return f".metadata cannot be read ({type(error).__name__})"
    ends: dict[str, int] = {}
    for part in index.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else -1
        if size < end:
            found = "missing" if size < 0 else f"{size} bytes long instead of {end}"
            return f"{name} is {found}"
    return _torn_archive(path / METADATA)


def read_metadata(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but its tensors; of a single file, with them (mapped, not read).

    Raises:
        InputError: The checkpoint is absent or torn.
    """
    reason = torn(path)
    if reason is not None:
        raise InputError(f"checkpoint {path} is torn: {reason}")
    file = path / METADATA if path.is_dir() else path
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=path.is_file())
    except UnpicklingError as error:
        raise InputError(
            f"{file} holds more than tensors and plain values and is not opened"
        ) from error


def tokenizers(path: Path) -> tuple[str, ...]:
    """Fingerprints of the tokenizer that the weights go with, in each form that its file has; none
    where nothing tells.

    Args:
        path: A checkpoint, or a folder with ``config.json``.
    """
    if (path / "config.json").is_file():
        return tuple(read_settings(path / "config.json").get(TOKENIZERS, ()))
    content = read_metadata(path)
    data = content.get("CorpusDataModule")  # the name by which Lightning keeps its state
    return (data["tokenizer"],) if data else tuple(content.get(TOKENIZERS, ()))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors in a checkpoint."""
    if path.is_dir():
        index = _index(path).state_dict_metadata
        return {
            key.removeprefix("state_dict.network."): tuple(entry.size)
            for key, entry in index.items()
            if key.startswith("state_dict.network.")
        }
    tensors = read_metadata(path)["state_dict"]
    return {key.removeprefix("network."): tuple(value.shape) for key, value in tensors.items()}


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint is: step, tokens, variant, sizes, whether it is whole, bytes on disk."""
    reason = torn(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    content: dict[str, Any] = {
        "path": str(path),
        "kind": "sharded" if path.is_dir() else "single file",
        "complete": reason is None,
        "torn": reason,
        "bytes": sum(file.stat().st_size for file in files),
    }
    if reason is not None:
        return content
    metadata = read_metadata(path)
    settings = metadata.get("hyper_parameters", {})
    content["step"] = metadata.get("global_step")
    content["tokens"] = metadata.get("callbacks", {}).get("Metrics", {}).get("tokens")
    content["variant"] = settings.get("position", {}).get("class_path", "").rpartition(".")[2]
    content["parameters"] = sum(torch.Size(shape).numel() for shape in shapes(path).values())
    content["settings"] = settings
    return content


def inspect(path: Path, as_json: bool = False) -> str:
    """What `describe` finds about a checkpoint or all in a folder, for people or programs."""
    found = [path]
    if path.is_dir() and not (path / METADATA).exists():
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints") or [path]
    described = [describe(one) for one in found]
    if as_json:
        return json.dumps(described if len(found) > 1 else described[0], indent=2)
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
        f"  step {one['step']:,}, {one['tokens'] or 0:,} tokens, {one['variant']}, "
        f"{one['parameters']:,} parameters\n  {shown}"
    )


def consolidate(directory: Path, file: Path) -> None:
    """Writes a sharded checkpoint as one file, with the optimizer's state, from which single
    processes and sharded ones can go on.

    Raises:
        InputError: ``directory`` is no whole sharded checkpoint, or ``file`` exists.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    content = read_metadata(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is one file already")
    if file.exists():
        raise InputError(f"{file} exists; choose another name")
    with replacing_file(file) as whole, TemporaryDirectory(dir=file.parent) as scratch:
        dcp_to_torch_save(directory, Path(scratch, "tensors"))
        tensors = torch.load(
            Path(scratch, "tensors"), map_location="cpu", weights_only=True, mmap=True
        )
        content["state_dict"] = tensors["state_dict"]
        content["optimizer_states"] = [
            _numbered(tensors[f"optimizer_{index}"])
            for index in range(sum(key.startswith("optimizer_") for key in tensors))
        ]
        torch.save(content, whole)


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


def _index(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(path).read_metadata()


def _torn_archive(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        return f"{file.name} is no complete archive ({error})"
    return None
