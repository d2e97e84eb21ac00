"""Named tensors in a folder: one file, or several with an index, as Hugging Face folders have
them. Nothing is ever unpickled."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ropepp.checksums import check_files
from ropepp.errors import InputError
from ropepp.files import DiskError, write_json
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
