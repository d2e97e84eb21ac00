"""What ``fit`` says about a row of a sweep, before anything is trained."""

import inspect
import pydoc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ropepp.train.strategy  # noqa: F401 (makes its short class name known)
from ropepp.errors import InputError, user_message
from ropepp.runs.records import RunSpec
from ropepp.runs.settings import canonical
from ropepp.sweep.config import SweepConfig, SweepRow
from ropepp.train.estimate import EstimateCLI
from ropepp.train.parsing import BASES, subclasses


def check_row(config: SweepConfig, row: SweepRow) -> dict[str, Any]:
    """Parses a row's arguments as ``fit`` does and makes its model without memory; an `InputError`
    if ``fit`` would refuse them. Returns all overrides of its runs, with complete classes."""
    given = config.fixed["set"] | row.asked
    with refused_at(config.file, lambda message: where(config, row, message)):
        overrides = {key: complete(value, key) for key, value in given.items()}
        tried = {key: (how.get("choices") or [how["low"]])[0] for key, how in config.search.items()}
        spec = RunSpec(row.name, config.seeds[0], overrides | tried)
        EstimateCLI(["fit", *config.arguments(spec)]).check()
    return overrides


@contextmanager
def refused_at(file: Path, at: str | Callable[[str], str]) -> Iterator[None]:
    """Makes what ``fit`` says of bad input an `InputError` that names the place in a YAML."""
    try:
        yield
    except Exception as error:
        if (text := user_message(error)) is None:
            raise
        raise InputError(f"{file}: {at if isinstance(at, str) else at(text)}: {text}") from error


def where(config: SweepConfig, row: SweepRow, message: str) -> str:
    """The part of the YAML that a message most likely speaks of."""
    own = f"variants.{row.variant}"
    parts = {own: config.variants[row.variant] or {}, "set": config.set, "axes": config.axes}
    for part, keys in (parts | {"search": config.search}).items():
        for key in keys:
            parent, _, last = canonical(key).rpartition(".")
            if key in message or (parent in message and f'key "{last}"' in message):
                return f"{part}.{key}" if part == own else f"{part}.{key} (in {row.name})"
    return own


def complete(value: Any, key: str) -> Any:
    """``value`` with its classes' defaults written out, which the parser would take from the class
    that stood there before. An `InputError` if an argument without default is missing."""
    if isinstance(value, list):
        return [complete(item, key) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {name: complete(item, f"{key}.{name}") for name, item in value.items()}
    arguments = complete(value.get("init_args") or {}, key)
    kind = find_class(str(value["class_path"]))
    if kind is not None:
        arguments = defaults(kind, key, arguments) | arguments
    return {**value, "init_args": arguments}


def find_class(path: str) -> type | None:
    """The class of a short name or an import path, None where the parser must find it."""
    if "." in path:
        found = pydoc.locate(path)
        return found if isinstance(found, type) else None
    return next((k for base in BASES for k in subclasses(base) if k.__name__ == path), None)


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class, and those that it hands on to the class that it extends."""
    own = dict(inspect.signature(kind).parameters)
    if kind.__base__ and any(one.kind is one.VAR_KEYWORD for one in own.values()):
        return parameters(kind.__base__) | own
    return own


def defaults(kind: type, key: str, given: dict[str, Any]) -> dict[str, Any]:
    """Plain values of the arguments of a class that are not given."""
    found = {}
    for name, parameter in parameters(kind).items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        follows = (key, name) == ("data", "seed")  # seed_everything
        if variadic or follows or name in given:
            continue
        default = parameter.default
        if default is parameter.empty:
            raise InputError(f"{key}: {kind.__name__} needs {name}")
        if isinstance(default, str | int | float | list | tuple | None):
            found[name] = list(default) if isinstance(default, tuple) else default
    return found
