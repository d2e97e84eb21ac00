"""Specs to plain data and back: what checkpoints, results and reports hold. Anybody may have
written it: what is read is bounded first."""

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.options import TRUST


def trusted(module: str, root: str = "ropepp") -> bool:
    """Whether specs of a module may be made: it is ``root`` or below, or the user has named it."""
    named = [root, *filter(None, os.environ.get(TRUST, "").split(","))]
    return any(f"{module}.".startswith(f"{one}.") for one in named)


MAX_VALUES = 100_000  # of settings, in all
MAX_DEPTH = 32  # of settings, one inside the other
MAX_TEXT, MAX_KEY = 100_000, 200  # characters of one


def to_plain(spec: Any) -> Any:
    """A spec as ``{"class_path": ..., "init_args": {...}}`` of plain values, tuples as lists."""
    if is_dataclass(spec):
        kind = type(spec)
        values = {field.name: to_plain(getattr(spec, field.name)) for field in fields(spec)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": values}
    if isinstance(spec, tuple | list):
        return [to_plain(item) for item in spec]
    return spec


def from_plain(value: Any, root: str = "ropepp") -> Any:
    """The spec that `to_plain` was given, from plain data that anybody may have written; what is no
    such mapping is returned as it is. An `InputError` if a class is no dataclass of the package
    ``root`` or of what else is `trusted`: nothing else is imported."""
    if not isinstance(value, dict):
        return tuple(from_plain(x, root) for x in value) if isinstance(value, list) else value
    module, _, name = value["class_path"].rpartition(".")
    if not trusted(module, root):
        raise InputError(
            f"class_path is {value['class_path']!r}; allowed are classes of {root}, and of modules "
            f"that you name because you trust them: ropepp --trust {module or 'MODULE'} ..."
        )
    kind, place = None, module
    while kind is None and place:  # it may have moved between the files of its package since
        kind = getattr(importlib.import_module(place), name, None)
        place = place.rpartition(".")[0]
    # Modules import classes of others too, and making one of these may do anything.
    own = trusted(getattr(kind, "__module__", ""), root)
    if not own or not isinstance(kind, type) or not is_dataclass(kind):
        raise InputError(f"class_path is {value['class_path']!r}, which is no spec of {root}")
    return kind(**{key: from_plain(item, root) for key, item in value["init_args"].items()})


def require_plain(value: Any, name: str) -> None:
    """Refuses what is not plain, finite and few, and names the key: a small file may be endless."""
    left = MAX_VALUES

    def check(item: Any, at: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise InputError(
                f"{name} has more than {MAX_VALUES:,} values, or more than {MAX_DEPTH} inside each "
                "other"
            )
        if isinstance(item, dict):
            for key, own in item.items():
                if not isinstance(key, str) or len(key) > MAX_KEY:
                    raise InputError(f"{name}: {at or 'it'} has a key that is no short text")
                check(own, f"{at}.{key}" if at else key, depth + 1)
        elif isinstance(item, list | tuple):
            for number, own in enumerate(item):
                check(own, f"{at}[{number}]", depth + 1)
        elif not (
            item is None
            or isinstance(item, bool)
            or (isinstance(item, str) and len(item) <= MAX_TEXT)
            or (isinstance(item, int) and abs(item) < 2**63)
            or (isinstance(item, float) and math.isfinite(item))
        ):
            raise InputError(f"{name}: {at or 'it'} is no plain finite value")

    check(value, "", 0)


@contextmanager
def understanding(name: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside with what a file holds becomes an `InputError` that names it."""
    try:
        yield
    except InputError as error:
        if str(name) in str(error):
            raise
        raise InputError(f"{name}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # damaged content raises anything
        kind = "" if isinstance(error, LookupError | TypeError) else f"{type(error).__name__}: "
        raise InputError(
            f"{name} is incomplete or holds a wrong value: {kind}{error}"[:2000]
        ) from error
