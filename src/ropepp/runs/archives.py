"""Files of `torch.save`: written to stay, opened without executing anything, with checksums."""

from collections.abc import Collection, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ropepp.checksums import Damaged, archive_sums, crc32s
from ropepp.errors import InputError
from ropepp.files import disk_errors, replacing_file
from ropepp.model.plain import understanding

Sums = Collection[tuple[int, int]]  # sizes in bytes and CRC-32


def write_archive(content: Any, target: Path) -> None:
    """Writes tensors and plain values, which are on the disk on return, or raises a `DiskError`."""
    with disk_errors(target), replacing_file(target) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of its C++ part, which hides what the file has said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_archive(file: Path | BytesIO, name: Path, mapped: bool = True) -> tuple[Any, Sums]:
    """The content of an archive, which messages call ``name``, and the checksums of its tensors,
    with which `check_tensors` compares those that are used; the rest is compared already. If
    ``mapped``, tensors of a path stay in the file until they are used. `Damaged` if it is torn, or
    not what was written; an `InputError` if it holds more than tensors and plain values."""
    sums = archive_sums(file, name)
    mapped = mapped and isinstance(file, Path)
    if not isinstance(file, Path):
        file.seek(0)
    with understanding(name):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except UnpicklingError as error:
            more = "holds more than tensors and plain values and is not opened"
            raise InputError(f"{name} {more}") from error
    return content, sums


def check_tensors(tensors: Iterable[tuple[str, Tensor]], sums: Sums, file: Path) -> None:
    """Compares tensors of `read_archive` with their checksums; `Damaged` names one that differs."""
    storages = {x.untyped_storage().data_ptr(): (name, x) for name, x in tensors}
    pairs = [
        (name, torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().data)
        for name, x in storages.values()
        if x.untyped_storage().nbytes()
    ]
    for (name, own), found in zip(pairs, crc32s([own for _, own in pairs]), strict=True):
        if (own.nbytes, found) not in sums:
            raise Damaged(f"{file} is damaged: tensor {name!r} is not what its checksum says")


def named_tensors(
    value: Any, at: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors inside of dictionaries and lists, with the keys that lead to them."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # what stands in many places is looked at once
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(item, f"{at}.{key}"[:500] if at else str(key)[:500], seen)
