"""JSON files that anybody may have written, or a kill torn; needs the standard library alone."""

import json
import zlib
from collections import Counter
from dataclasses import MISSING, asdict, fields
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ropepp.errors import InputError
from ropepp.files import read_errors, write_synced

CHECKSUM = "crc32"
LARGEST, SETTINGS = 1 << 28, 1 << 24  # bytes of a file that is read at once; of one of settings
Record = TypeVar("Record")


class Damaged(InputError):  # noqa: N818 (what it is, not that it is one)
    """A file is not what was written."""


def write_record(path: Path, record: Any) -> None:
    """Writes a dataclass with a checksum of its content, and waits until the disk has it. Raises a
    `DiskError` if it cannot be written."""
    values = asdict(record)
    content = json.dumps({**values, CHECKSUM: checksum_of(values)}, indent=2)
    write_synced(path, f"{content}\n".encode())


def read_record(path: Path, cls: type[Record], version: int | None = None) -> Record:
    """What `write_record` wrote of a dataclass, whose `format_version`, if it has one, must be
    this. An `InputError` if it is missing, damaged, or of another format or with other types."""
    values = read_object(path)
    if (found := values.get("format_version")) != version:
        raise InputError(
            f"{path}: format_version is {str(found)[:80]}; {version} can be read, which"
            " `ropepp prepare` makes"
        )
    checksum = values.pop(CHECKSUM, None)
    record = as_record(values, cls, str(path))
    if checksum != (found := checksum_of(values)):
        raise Damaged(f"{path} is damaged: its {CHECKSUM} is {found}, not {checksum!r:.80}")
    return record


def read_json(path: Path, limit: int = LARGEST) -> Any:
    """The content of a JSON file. Raises an `InputError` if it is missing, no file, larger than
    `limit` bytes, or no JSON, or has a key twice."""
    content = read_bytes(path, limit)
    try:
        return json.loads(content, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no JSON: {' '.join(str(error).split())}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r:.80} stands twice")
    return found


def read_object(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """The content of a JSON file that holds an object; raises what `read_json` does."""
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise Damaged(f"{path} is {type(content).__name__}; allowed is a JSON object")
    return content


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """A file's content; an `InputError` if it is missing, no file, or above `limit` bytes."""
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path} is {'no file' if path.exists() else 'missing'}")
    with read_errors(path):
        if path.stat().st_size > limit:
            raise Damaged(f"{path} has more than {limit} bytes, the most that is read")
        return path.read_bytes()


def as_record(values: Any, cls: type[Record], place: str) -> Record:
    """A dataclass of values of the types that it states, those with a default as they like; numbers
    are finite, whole ones from 0 to below 2**63. Raises an `InputError` if they are others."""
    types, needed = _types(cast(Any, cls))
    if not isinstance(values, dict) or not needed <= values.keys() <= types.keys():
        keys = set(values) if isinstance(values, dict) else set()
        odd = sorted(map(str, (needed - keys) | (keys - types.keys()))) or values
        raise InputError(
            f"{place} has other keys than allowed: missing or unknown are {odd!s:.200}"
        )
    for key, value in values.items():
        if not _is_of(value, kind := types[key]):
            allowed = getattr(kind, "__name__", kind)
            raise InputError(f"{place}: {key} is {value!r:.80}; it must be {allowed}")
    return cls(**values)


@lru_cache
def _types(cls: Any) -> tuple[dict[str, Any], set[str]]:
    required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    return get_type_hints(cls), required


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
