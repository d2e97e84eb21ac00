"""Sharded checkpoints: folders with the shards of each process in ``.distcp`` files and an index,
``.metadata``, which is a pickle. Nothing of them is executed, and what is read is compared with its
checksums.
"""

import math
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import set_element, unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ropepp.checksums import THREADS, Damaged, check_files, write_checksums
from ropepp.errors import InputError
from ropepp.files import disk_errors, sync_folder
from ropepp.model.plain import understanding
from ropepp.runs.archives import check_tensors, named_tensors, read_archive

INDEX = ".metadata"
MAX_INDEX_BYTES_PER_FILE = 1 << 20  # of shards; a thousand tensors in it need a fifth


class _Record:
    """Stands for an instance of a class in the index: what was said of it, and nothing else."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata "
    "TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath WindowsPath",
}
# All that may stand in an index: nothing of it is more than a value.
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch", name): getattr(torch, name) for name in _DTYPES.split()},
    ("torch", "Size"): tuple,
    **{
        (module, name): type(name, (_Record,), {})
        for module, names in _RECORDS.items()
        for name in names.split()
    },
}


class _Unpickler(pickle._Unpickler):
    """Python's own, not that in C, which takes memory for numbers that a file merely names."""

    dispatch = {  # noqa: RUF012 (as the base class has it)
        code: call
        for code, call in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(f"it names {module}.{name}, which no index needs, and is not opened")
        return _ALLOWED[module, name]


class Slice(NamedTuple):
    """Where a part of a tensor, or a plain value, lies: an archive of its own inside a file."""

    relative_path: str
    offset: int
    length: int


def read_index(folder: Path) -> Metadata:
    """What a sharded checkpoint holds and where. `Damaged` if the index is not what was written, an
    `InputError` if it holds something else than an index does, or does not fit the files."""
    file = folder / INDEX
    if not file.is_file():
        raise Damaged(f"{INDEX} is missing")
    check_files(folder, [INDEX])
    status = file.stat()
    most = MAX_INDEX_BYTES_PER_FILE * (1 + sum(1 for _ in folder.glob("*.distcp")))
    if status.st_size > most:
        raise InputError(f"{file} has {status.st_size:,} bytes; allowed here: {most:,}")
    return _read_index(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read_index(file: Path, *version: int) -> Metadata:
    with understanding(file):
        root = _state(_Unpickler(BytesIO(file.read_bytes())).load(), "Metadata")
        places = dict(_place(*pair) for pair in root["storage_data"].items())
        named = _named(root["state_dict_metadata"])
        entries = {key: _entry(key, one, places) for key, one in named}
        paths = {
            key: path
            for key, path in _named(root.get("planner_data") or {})
            if all(type(x) is str or (type(x) is int and 0 <= x < 2**20) for x in path)
        }
    return Metadata(entries, planner_data=paths, storage_data=places)


def _named(given: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if not isinstance(key, str):
            raise InputError(f"{key!r:.60} stands where a name belongs")
        yield key, value


def _state(record: Any, name: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise InputError(f"a {type(record).__name__} stands where {name} belongs")
    return record.state


def _size(given: Any) -> torch.Size:
    if not isinstance(given, tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in given):
        raise InputError(f"{given!r:.60} stands where a size belongs")
    return torch.Size(given)


def _place(key: Any, value: Any) -> tuple[MetadataIndex, Slice]:
    of, place = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
    name, offset, length = (place[name] for name in ("relative_path", "offset", "length"))
    if Path(name).name != name or place.get("transform_descriptors"):
        raise InputError(f"it names {name!r:.200}; allowed are plain files of the same folder")
    _size((offset, length))
    where = None if of.get("offset") is None else _size(of["offset"])
    return MetadataIndex(of["fqn"], where), Slice(name, offset, length)


def _entry(
    key: str, given: Any, places: dict[MetadataIndex, Slice]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(given).__name__ == "BytesStorageMetadata":
        places[MetadataIndex(key)]
        return BytesStorageMetadata()
    fields = _state(given, "TensorStorageMetadata")
    dtype, size = _state(fields["properties"], "TensorProperties")[0], _size(fields["size"])
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{dtype!r:.60} stands where a dtype belongs")
    parts = []
    for chunk in fields["chunks"]:
        part = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(part["offsets"]), _size(part["sizes"])
        inside = all(o + n <= m for o, n, m in zip(offsets, sizes, size, strict=True))
        length = places[MetadataIndex(key, offsets)].length
        if not inside or math.prod(sizes) * dtype.itemsize > length:
            raise InputError(f"a part of {key!r} is larger than it or than its place in a file")
        parts.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        raise InputError(f"the parts of {key!r} do not make the whole of it")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, parts)


class _Reader(dcp.FileSystemReader):
    """Reads slices in threads, with checksums, and nothing but tensors and plain values."""

    def read_metadata(self) -> Metadata:
        return read_index(Path(self.path))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda item: self._read(item, planner), plan.items))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @torch.no_grad()
    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        place: Any = self.storage_data[item.storage_index]
        file, fqn = Path(self.path, place.relative_path), item.storage_index.fqn
        with file.open("rb") as whole:
            whole.seek(place.offset)
            content, sums = read_archive(BytesIO(whole.read(place.length)), file)
        with understanding(file):
            check_tensors(named_tensors(content, fqn), sums, file)
            if item.type == LoadItemType.BYTE_IO:
                cast(_Planner, planner).take(item, content)
                return
            if not isinstance(content, Tensor):
                raise InputError(f"{file} has {type(content).__name__} as {fqn!r}, not a tensor")
            for dim, (start, n) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                content = content.narrow(dim, start, n)
            target = planner.resolve_tensor(item).detach()
            if target.shape != content.shape:
                raise InputError(f"{file}: {fqn!r} is {tuple(content.shape)} there")
            target.copy_(content)
            planner.commit_tensor(item, target)


class _Planner(dcp.DefaultLoadPlanner):
    """Torch's, whose ``load_bytes`` would unpickle anything."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        raise NotImplementedError("see `take`")

    def take(self, item: ReadItem, value: Any) -> None:
        """Puts a plain value where it belongs."""
        set_element(self.original_state_dict, self.mappings[item.dest_index.fqn], value)


def load_shards(wanted: dict[str, Any], folder: Path, alone: bool = False) -> None:
    """Fills the tensors in ``wanted``, nested as they were saved, sharded or not; without processes
    too, or ``alone`` where there are others. Raises `Damaged` if something is not what was written,
    an `InputError` if it is missing, of another shape, or no tensor or plain value."""
    reader, alone = _Reader(folder), alone or not dist.is_initialized()
    with one_failure(folder):
        dcp.load(wanted, storage_reader=reader, planner=_Planner(), no_dist=alone)


def read_shards(folder: Path) -> dict[str, Any]:
    """All that a sharded checkpoint holds, whole: ``state_dict``, ``optimizer_0`` and so on."""
    index = read_index(folder)
    flat: dict[str, Any] = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        if isinstance(one, TensorStorageMetadata)
        else None
        for key, one in index.state_dict_metadata.items()
    }
    load_shards(flat, folder, alone=True)
    with understanding(folder / INDEX):
        return unflatten_state_dict(flat, index.planner_data)


def seal(folder: Path) -> None:
    """Writes the checksum of a new checkpoint's index, and waits until the disk has all names."""
    with disk_errors(folder):
        write_checksums(folder, [INDEX])
        sync_folder(folder)


@contextmanager
def one_failure(folder: Path) -> Iterator[None]:
    """What processes tell each other of a failure, as one `InputError` or `OSError`."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        known = [cause for cause in causes if isinstance(cause, InputError | OSError)]
        if not known:
            with understanding(folder):
                raise causes[0] from error
        raise known[0] from error
