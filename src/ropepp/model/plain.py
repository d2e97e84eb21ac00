"""Specs to plain data and back: what checkpoints, results and reports hold."""

import importlib
import os
from dataclasses import fields, is_dataclass
from typing import Any

from ropepp.errors import InputError
from ropepp.options import TRUST


def trusted(module: str, root: str = "ropepp") -> bool:
    """Whether specs of a module may be made: it is ``root`` or below, or the user has named it."""
    named = [root, *filter(None, os.environ.get(TRUST, "").split(","))]
    return any(f"{module}.".startswith(f"{one}.") for one in named)


def to_plain(spec: Any) -> Any:
    """A frozen dataclass as ``{"class_path": ..., "init_args": {...}}`` of plain values; tuples
    become lists."""
    if is_dataclass(spec):
        kind = type(spec)
        values = {field.name: to_plain(getattr(spec, field.name)) for field in fields(spec)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": values}
    if isinstance(spec, tuple | list):
        return [to_plain(item) for item in spec]
    return spec


def from_plain(value: Any, root: str = "ropepp") -> Any:
    """The spec that `to_plain` was given; what is no such mapping is returned as it is.

    Args:
        value: Plain data that anybody may have written.
        root: The package that is allowed besides what `trusted` says: nothing else is imported.

    Raises:
        InputError: A class is no dataclass of these modules.
    """
    if not isinstance(value, dict):
        return tuple(from_plain(x, root) for x in value) if isinstance(value, list) else value
    module, _, name = value["class_path"].rpartition(".")
    if not trusted(module, root):
        raise InputError(
            f"class_path is {value['class_path']!r}; allowed are classes of {root}, and of modules "
            f"that you name because you trust them: ropepp --trust {module or 'MODULE'} ..."
        )
    kind = _find(module, name)
    # Modules import classes of others too, and making one of these may do anything.
    own = trusted(getattr(kind, "__module__", ""), root)
    if not own or not isinstance(kind, type) or not is_dataclass(kind):
        raise InputError(f"class_path is {value['class_path']!r}, which is no spec of {root}")
    return kind(**{key: from_plain(item, root) for key, item in value["init_args"].items()})


def _find(module: str, name: str) -> Any:
    """What a module, or a package around it, calls so: a class may have moved between the files of
    its package since the checkpoint was written."""
    kind = getattr(importlib.import_module(module), name, None)
    while kind is None and "." in module:
        module = module.rpartition(".")[0]
        kind = getattr(importlib.import_module(module), name, None)
    return kind
