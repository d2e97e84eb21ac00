"""Named tensors in a folder: one file, or several with an index, as Hugging Face folders have
them, and the query matrices of Llamas there. Nothing is ever unpickled."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropepp.checksums import check_files
from ropepp.errors import InputError
from ropepp.files import DiskError, write_json
from ropepp.model.heads import HeadLayout, turn
from ropepp.model.plain import understanding
from ropepp.records import SETTINGS, read_object

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the files that its index names; an `InputError`
    if one is missing or torn, or the index names what is not there."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return _read(folder / WHOLE)
    index = folder / INDEX
    check_files(folder, [INDEX])
    places = read_object(index, SETTINGS).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise InputError(f"{index} has no 'weight_map' of names and files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise InputError(f"{index} names {file!r}; allowed are files of the same folder")
        tensors.update(_read(folder / file))
    for name, file in places.items():
        if name not in tensors:
            raise InputError(f"{index}: tensor {name!r} is not in {file}")
    return tensors


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes what `read_tensors` reads: one file, or several of at most ``shard_bytes`` each (or of
    one tensor that is larger) with an index. The folder must be new."""
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        try:
            save_file(shard, _part(folder, len(names)), metadata={"format": "pt"})
        except SafetensorError as error:  # of the system: a full disk, a file too large
            raise DiskError(f"{folder} cannot be written: {error}") from error
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        _part(folder, 0).rename(folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, own in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        _part(folder, number).rename(folder / file)
        places.update(dict.fromkeys(own, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}"


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        pickles = sorted(p.name for p in file.parent.glob("*") if p.suffix in (".bin", ".pt"))
        why = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise InputError(f"{file} is missing: a folder holds config.json and safetensors{why}")
    check_files(file.parent, [file.name])
    with understanding(file):
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file} is no complete safetensors file: {error}") from error


def turned(weight: Tensor, layout: HeadLayout) -> Tensor:
    """A query matrix (H D, M), float64, in which every head has rows of its own, from one of
    projections (P D, M).

    A turn of a query commutes with its rotation, so a head with phase p is one with phase 0 whose
    rows of halves [a, b] are ``cos(p) [a, b] + sin(p) [-b, a]`` (see `turn`).
    """
    a, b = weight.double().unflatten(0, (layout.num_projections, 2, -1)).unbind(1)
    return torch.cat([x for p, phase, _ in layout.heads for x in turn(a[p], b[p], phase)])


def turned_back(weight: Tensor, layout: HeadLayout) -> Tensor | None:
    """What `turned` has made ``weight`` of; None if its heads are no turned copies."""
    a, b = weight.double().unflatten(0, (layout.num_heads, 2, -1)).unbind(1)
    # Of each projection a head that is an exact copy, if there is one.
    order = sorted(range(layout.num_heads), key=lambda i: layout.heads[i].phase % 90 == 0)
    of = {layout.heads[i].projection: i for i in order}
    chosen = [of[p] for p in range(layout.num_projections)]
    found = torch.cat([x for i in chosen for x in turn(a[i], b[i], -layout.heads[i].phase)])
    exact = all(head.phase % 90 == 0 for head in layout.heads)
    bound = 0.0 if exact else 2 * torch.finfo(weight.dtype).eps * weight.abs().max().item()
    return found if torch.allclose(turned(found, layout), weight.double(), 0.0, bound) else None
