"""Settings of ``fit``: read from YAML, compared, named, and written as flags."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ropepp.errors import InputError

# A configuration beyond these is a mistake or an attack; all that is read is held to them first.
MAX_BYTES, MAX_NODES, MAX_DEPTH = 2**20, 10_000, 50
MOST_TEXT = 2000  # characters with a reference, or that one stands for
# What a value may take from elsewhere: another key (relative with dots), or the environment.
REFERENCE = re.compile(r"\$\{(?:oc\.env:[^${}]*|(\.*[\w.\[\]-]+))\}")


def read_yaml(file: Path) -> Any:
    """Content of a YAML file, in which 1e-3 is a number. An `InputError` if it cannot be read, is
    neither a list nor a dictionary, has a key twice, or is larger, deeper or, with its aliases
    written out, longer than a configuration can be."""
    if file.exists() and not file.is_file():  # a pipe would wait for ever
        raise InputError(f"{file} is no file")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{file} is longer than {MAX_BYTES:,} bytes: no configuration is")
        text = content.decode()
        check_size(text, file)
        return OmegaConf.to_container(OmegaConf.load(StringIO(text)))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file} is no file") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise InputError(f"{file} is nested too deeply") from None


def check_size(text: str, file: object) -> None:
    """Measures YAML with its aliases written out, before anything is built of it; ``file`` is where
    it is from. An `InputError` if it has more than `MAX_NODES` values, is nested deeper than
    `MAX_DEPTH`, or an alias stands within what it means."""
    total = 0
    sizes: dict[str | None, int] = {}  # of what an anchor names
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in opened):
                raise InputError(f"{file}: *{event.anchor} stands within what it means")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1 + len(event.value) // 100
            total += sizes[event.anchor]
        if total > MAX_NODES or len(opened) > MAX_DEPTH:
            raise InputError(
                f"{file} has more than {MAX_NODES:,} values (with its aliases written out), or "
                f"more than {MAX_DEPTH} levels: no configuration has"
            )


def check_references(content: Any, file: object) -> None:
    """Checks that ``${...}`` in what `read_settings` gave of a ``file`` stand for plain values, so
    that filling them in has an end. An `InputError` if one is of another kind than `REFERENCE`, or
    leads to a list, to other keys, to a long text or to another reference."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while todo:
        at, value = todo.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [((*at, str(key)), item) for key, item in items]
        if not isinstance(value, str) or "${" not in value:
            continue
        fine = "${" not in REFERENCE.sub("", value) and len(value) <= MOST_TEXT
        for path in filter(None, REFERENCE.findall(value)):
            dots = len(path) - len(path.lstrip("."))
            parts = [part for part in re.split(r"[.\[\]]", path) if part]
            found = _at(content, (*(at[: len(at) - dots] if dots else ()), *parts))
            plain = not isinstance(found, dict | list) and "${" not in (text := str(found))
            fine = fine and plain and len(text) <= MOST_TEXT
        if not fine:
            raise InputError(
                f"{file}: {'.'.join(at)} is {value[:100]!r}; allowed: ${{KEY}} of a plain value, "
                "${oc.env:NAME}"
            )


def _at(content: Any, path: Iterable[str]) -> Any:
    """The value at a path, None without one."""
    for part in path:
        if isinstance(content, list):
            inside = part.isdecimal() and len(part) < 9 and int(part) < len(content)
            content = content[int(part)] if inside else None
        else:
            content = content.get(part) if isinstance(content, dict) else None
    return content


def read_settings(file: Path, within: tuple[Path, ...] = (), left: list[int] | None = None) -> Any:
    """Content of a YAML file and of the files that it names, relative to itself. ``within`` are the
    files that led here, ``left`` says how many values all of them together may still have. An
    `InputError` as of `read_yaml`; or a file leads back to itself, or they have too many values."""
    if (here := file.resolve()) in within:
        way = " -> ".join(path.name for path in (*within[within.index(here) :], here))
        raise InputError(f"{file} names itself: {way}")
    left = [MAX_NODES] if left is None else left
    left[0] -= MAX_NODES // 200  # so many files at most
    return read_files(read_yaml(file), file.parent, (*within, here), left)


def read_files(
    value: Any, folder: Path, within: tuple[Path, ...] = (), left: list[int] | None = None
) -> Any:
    """``value`` with names of YAML files in ``folder`` replaced by content, see `read_settings`."""
    left = [MAX_NODES] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        where = within[0] if within else folder
        raise InputError(f"{where} has more than {MAX_NODES:,} values with the files that it names")
    if isinstance(value, dict):
        return {key: read_files(item, folder, within, left) for key, item in value.items()}
    if isinstance(value, list):
        return [read_files(item, folder, within, left) for item in value]
    return read_settings(folder / value, within, left) if names_file(value) else value


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


def parents_first(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys in an order in which a class does not undo what is said of its arguments."""
    return dict(sorted(given.items(), key=lambda pair: canonical(pair[0]).count(".")))


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
        # A class that is given anew comes without the old one's arguments.
        old = tuple(f"{key}." for key in new)
        flat = {key: value for key, value in flat.items() if not key.startswith(old)} | new
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
