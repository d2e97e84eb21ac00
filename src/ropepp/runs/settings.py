"""Settings of ``fit``: read from YAML, compared, named, and written as flags."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ropepp.errors import InputError


def read_yaml(file: Path) -> Any:
    """Content of a YAML file, in which 1e-3 is a number.

    Raises:
        InputError: It cannot be read, is neither a list nor a dictionary, or has a key twice.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except FileNotFoundError:
        raise InputError(f"{file} is no file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error


def read_settings(file: Path) -> Any:
    """Content of a YAML file and of the files that it names, relative to itself."""
    return read_files(read_yaml(file), file.parent)


def read_files(value: Any, folder: Path) -> Any:
    """``value`` with names of YAML files, relative to ``folder``, replaced by their content."""
    if isinstance(value, dict):
        return {key: read_files(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [read_files(item, folder) for item in value]
    return read_settings(folder / value) if names_file(value) else value


def named_files(value: Any) -> Iterator[str]:
    """Names of YAML files in a value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from named_files(item)
    elif names_file(value):
        yield value


def names_file(value: Any) -> bool:
    """Whether a value stands for a configuration file."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def canonical(key: str) -> str:
    """A key of ``fit`` without ``init_args``, which may be left out."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as canonical keys and values; a class is the value of its own key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        at = canonical(f"{prefix}.{key}" if prefix else key)
        if isinstance(value, dict) and "class_path" in value:
            flat[at] = class_name(value)
            flat |= flatten(value.get("init_args") or {}, at)
        elif isinstance(value, dict):
            flat |= flatten(value, at)
        else:
            flat[at] = value
    return flat


def overlay(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Flat settings of several layers, of which later ones win."""
    flat: dict[str, Any] = {}
    for layer in layers:
        new = flatten(layer)
        kept = {
            key: value
            for key, value in flat.items()
            # A class that is given anew comes without the old one's arguments.
            if not any(key.startswith(f"{other}.") for other in new)
        }
        flat = kept | new
    return flat


def class_name(value: Mapping[str, Any]) -> str:
    """The short name of a ``{class_path, init_args}``."""
    return str(value["class_path"]).rpartition(".")[2]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Last parts of keys, or the whole where two would be alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def label(value: Any) -> str:
    """A value as part of a name."""
    if isinstance(value, dict):
        own = [class_name(value)] if "class_path" in value else []
        inner = (value.get("init_args") or {}) if own else value
        text = "_".join([*own, *map(label, flatten(inner).values())])
    elif isinstance(value, list):
        text = "_".join(map(label, value)) or "none"
    elif isinstance(value, bool) or value is None:
        text = json.dumps(value)
    elif isinstance(value, float):
        text = f"{value:.12g}"
    else:
        text = Path(value).stem if names_file(value) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def as_flag(key: str, value: Any) -> str:
    """A setting as ``fit`` reads it from the command line."""
    as_json = value is None or isinstance(value, dict | list | bool)
    return f"--{key}={json.dumps(value) if as_json else value}"


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """What differs between two settings, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{at}[{number}]" if len(old) > 1 else at)
    elif old != new:
        yield f"{at} was {json.dumps(old)} and is {json.dumps(new)}"
