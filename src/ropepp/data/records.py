"""JSON files that say what a corpus is: with a checksum of themselves, and read with suspicion."""

import json
import zlib
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ropepp.errors import InputError
from ropepp.files import write_synced

CHECKSUM = "crc32"
LARGEST_JSON = 256 << 20  # bytes of a file that is parsed
Record = TypeVar("Record")


def write_record(path: Path, record: Any) -> None:
    """Writes a dataclass with a checksum of its content, and waits until the disk has it.

    Raises:
        DiskError: It cannot be written.
    """
    values = asdict(record)
    content = json.dumps({**values, CHECKSUM: checksum_of(values)}, indent=2)
    write_synced(path, f"{content}\n".encode())


def read_record(path: Path, cls: type[Record], version: int | None = None) -> Record:
    """What `write_record` wrote.

    Args:
        path: The file.
        cls: The dataclass.
        version: What its `format_version` must be, if it has one.

    Raises:
        InputError: It is missing, of another format, damaged, or has values of other types.
    """
    values = read_json(path)
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != version:
        raise InputError(
            f"{path}: format_version is {str(found)[:80]}; {version} can be read, which"
            " `ropepp prepare` makes"
        )
    checksum = values.pop(CHECKSUM, None) if isinstance(values, dict) else None
    record = as_record(values, cls, str(path))
    if checksum != (found := checksum_of(values)):
        raise InputError(f"{path} is damaged: its {CHECKSUM} is {found}, not {checksum!r:.80}")
    return record


def read_json(path: Path, limit: int = LARGEST_JSON) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: It is missing, no file, larger than `limit` bytes, or no JSON.
    """
    content = read_bytes(path, limit)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {' '.join(str(error).split())}") from error


def read_bytes(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """The content of a file.

    Raises:
        InputError: It is missing, no file, or larger than `limit` bytes.
    """
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path} has more than {limit} bytes, the most that is read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def as_record(values: Any, cls: type[Record], place: str) -> Record:
    """A dataclass of values of the types that it states; numbers are finite, whole ones from 0 to
    below 2**63.

    Raises:
        InputError: They are others.
    """
    types = _types(cast(Any, cls))
    if not isinstance(values, dict) or values.keys() != types.keys():
        odd = sorted(map(str, values.keys() ^ types.keys())) if isinstance(values, dict) else values
        raise InputError(
            f"{place} has other keys than allowed: missing or unknown are {odd!s:.200}"
        )
    for key, kind in types.items():
        if not _is_of(values[key], kind):
            allowed = getattr(kind, "__name__", kind)
            raise InputError(f"{place}: {key} is {values[key]!r:.80}; it must be {allowed}")
    return cls(**values)


@lru_cache
def _types(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    if kind is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    origin, of = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_is_of(value, each) for each in of)
    if origin is list:
        return isinstance(value, list) and all(_is_of(each, of[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(each, of[1]) for each in value.values())
    return kind is Any or isinstance(value, kind)


def checksum_of(values: Any) -> str:
    """Of plain values, whatever their layout in a file."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
