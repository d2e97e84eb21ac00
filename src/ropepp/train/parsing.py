"""How the command line of fit is read: classes by short names, bounds, what is wrong in words."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.strategies import Strategy

import ropepp.data.recall.task  # noqa: F401 (makes its short class name known)
from ropepp.data.loading.datamodule import RowsDataModule
from ropepp.data.packing.concat import Packing
from ropepp.errors import InputError
from ropepp.model.positions import Position, Scaling
from ropepp.runs.settings import check_size
from ropepp.train.optim import OptimizerSpec
from ropepp.train.schedules import Schedule

PARSER_MODE = "omegaconf+"
SPECS = {
    "position": Position,
    "scaling": Scaling,
    "optimizer": OptimizerSpec,
    "schedule": Schedule,
    "data": RowsDataModule,
    "packing": Packing,
}
BASES = (*SPECS.values(), Strategy)  # of the classes that short names mean


def prepare_parsing() -> None:
    """Lets parsers know the classes and the bounds."""
    set_parsing_settings(subclasses_enabled=list(SPECS.values()))
    set_loader(PARSER_MODE, bounded_load, (yaml.YAMLError,))


def explained(error: ArgumentError) -> InputError | None:
    """What is wrong and what is allowed, where the parser's error lists all that it tried."""
    text = " ".join(str(error).split())
    # The key of a class and, inside its arguments, that of a spec: data and packing.
    key = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    option = re.search(r"given class_path '([^']+)': Option '([^']+)' is not accepted", text)
    if key and option:
        return InputError(f"{key}: {option[1]} has no argument {option[2]!r}")
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    base = SPECS.get(key.rsplit(".", 1)[-1])
    if unknown and base is not None:
        known = sorted(kind.__name__ for kind in subclasses(base))
        names = ", ".join(name for name in known if not name.startswith("_"))
        return InputError(f"{key} is {unknown[1]!r}; allowed: {names}, a class path or a file")
    return None


def bounded_load(text: str, path: str = "") -> Any:
    """A value or file as the parser reads it, unless that would never end."""
    if len(text) > 40:
        check_size(text, path or "a value")
    return get_loader("yaml")(text)


def subclasses(base: type) -> set[type]:
    """All classes below ``base`` that have been imported."""
    found: set[type] = set(base.__subclasses__())
    return found.union(*(subclasses(kind) for kind in found))
