"""What the YAMLs of sweeps and pipelines may say: frozen dataclasses, whose fields are the keys.

A key's type stands with words for what is allowed, such as `FitKeys`; jsonargparse checks it.
"""

import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from ropepp.errors import InputError
from ropepp.runs.settings import as_flag, named_files, names_file, parents_first

OWN = ("config", "experiment", "run", "logs", "resume", "seed_everything", "ckpt_path")
FIT_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._+-]{0,150}[A-Za-z0-9_+-])?")
NAME_RULE = "letters, digits and . _ + -, no dot at the end, no ending of a file such as .md"
OWN_FILES = (".csv", ".html", ".json", ".lock", ".md", ".yaml", ".yml")

T = TypeVar("T")
AnyText = Annotated[str, "text"]
Whole = Annotated[int, "a whole number"]
FitFiles = Annotated[list[str], "configuration files of fit"]
FitKeys = Annotated[dict, "keys of fit and values"]


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """What the YAMLs of sweeps and pipelines have in common; docs/sweeps.md and docs/train.md say
    what the keys mean. ``file`` is the YAML, to which files in it are relative; an `InputError`
    names a key whose value is not allowed."""

    file: Path
    name: AnyText
    base: FitFiles
    variants: Annotated[dict, "names and their keys of fit"]
    set: FitKeys = field(default_factory=dict)
    seed: Whole = 0
    launcher: Annotated[str, "a command with {args}"] = "{python} -m ropepp.cli fit {args}"
    logs: Annotated[str, "a folder"] = "logs"

    placeholders: ClassVar[tuple[str, ...]] = ("python", "args")  # that the launcher may have

    def __post_init__(self) -> None:
        self.check_name("name", self.name)
        self.check_files("base", self.base)
        self.check_fit_keys("set", self.set)
        for name, own in self.variants.items():
            self.check_name("a name in variants", name)
            self.check_fit_keys(f"variants.{name}", {} if own is None else own)
        self.check_seeds("seed", [self.seed])
        self._check_launcher()

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return Path(self.logs, self.name)

    def path(self, name: str) -> Path:
        """A file that the YAML names."""
        return (self.file.parent / name).resolve()

    def configs(self, files: Iterable[str]) -> list[str]:
        """Configuration files as arguments of ``fit``."""
        return [f"--config={self.path(file)}" for file in files]

    def flags(self, given: Mapping[str, Any]) -> list[str]:
        """Keys of ``fit`` as its arguments."""
        return [
            as_flag(key, str(self.path(value)) if names_file(value) else value)
            for key, value in parents_first(given).items()
        ]

    def launch(self, args: list[str], **values: str) -> list[str]:
        """The command of a run: ``{args}`` becomes all of ``args``, others their value."""
        words: list[str] = []
        for word in shlex.split(self.launcher):
            for name, value in values.items():
                word = word.replace(f"{{{name}}}", value)  # noqa: PLW2901
            words += args if word == "{args}" else [word]
        return words

    def require_launcher(self) -> None:
        """Refuses a launcher that is no program here."""
        program = shlex.split(self.launcher)[0]
        if program != "{python}" and shutil.which(program) is None:
            self.refuse(f"launcher begins with {program!r}, which is no program here")

    def refuse(self, message: str) -> NoReturn:
        raise InputError(f"{self.file}: {message}")

    def check_name(self, where: str, name: Any) -> None:
        """Refuses what cannot be the name of a folder and a word of a command."""
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith(OWN_FILES):
            self.refuse(f"{where} is {name!r}; allowed: {NAME_RULE}")

    def check_seeds(self, where: str, seeds: Iterable[int]) -> None:
        """Refuses seeds that ``fit`` would refuse."""
        for seed in seeds:
            if not 0 <= seed < 2**32:
                self.refuse(f"{where} is {seed}; allowed: 0 to 2**32 - 1")

    def check_files(self, where: str, names: Iterable[str]) -> None:
        """Refuses files that are missing."""
        for name in names:
            if not self.path(name).is_file():
                self.refuse(f"{where} is {name!r}, which is no file beside {self.file}")

    def check_variants(self, where: str, names: Iterable[str]) -> None:
        """Refuses variants that there are not."""
        for name in names:
            if name not in self.variants:
                self.refuse(f"{where} has {name!r}; allowed: {', '.join(self.variants)}")

    def check_fit_keys(self, where: str, given: Any) -> None:
        """Refuses what is not keys of ``fit`` that a YAML may set."""
        if not isinstance(given, dict):
            self.refuse(f"{where} is {given!r}; allowed: keys of fit and values")
        for key, value in given.items():
            if not isinstance(key, str) or not FIT_KEY.fullmatch(key):
                self.refuse(f"{where}: {key!r} is no key of fit, such as model.optimizer.lr")
            if key.partition(".")[0] in OWN:
                self.refuse(f"{where}.{key}: {', '.join(OWN)} are set for each run")
            self.check_files(f"{where}.{key}", named_files(value))

    def _check_launcher(self) -> None:
        try:
            words = shlex.split(self.launcher)
        except ValueError as error:
            self.refuse(f"launcher is {self.launcher!r}: {error}")
        unknown = {*re.findall(r"\{(\w*)\}", self.launcher)} - {*self.placeholders}
        if words.count("{args}") != 1 or unknown:
            names = ", ".join(f"{{{name}}}" for name in self.placeholders)
            self.refuse(
                f"launcher is {self.launcher!r}; it needs {{args}} as one word; known: {names}"
            )


def read_config(kind: type[T], file: Path, content: Any, at: str = "", /, **other: Any) -> T:
    """The frozen dataclass ``kind`` that a part of a YAML ``file`` stands for, which is at ``at``
    in it, such as ``stages[0]`` (empty: all of it); ``other`` are values of fields that are no
    keys. An `InputError` names a key that is unknown or missing, or whose value is not allowed."""
    from jsonargparse import ArgumentError, ArgumentParser

    where = f"{at}." if at else ""
    hints = {
        name: get_args(hint)  # its type, and what is allowed in words
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is Annotated
    }
    if not isinstance(content, dict):
        raise InputError(f"{file}: {at or 'it'} is {content!r}; allowed: keys {', '.join(hints)}")
    for name in content:
        if name not in hints:
            raise InputError(f"{file}: unknown key {where}{name}; allowed: {', '.join(hints)}")
    for one in fields(kind):  # type: ignore[arg-type]
        required = one.default is MISSING and one.default_factory is MISSING
        if one.name in hints and required and not content.get(one.name):
            raise InputError(f"{file}: {where}{one.name} is missing or empty")
    parser, given = ArgumentParser(exit_on_error=False), {}
    for name, value in content.items():
        if value is not None:  # null leaves the default
            alone = isinstance(value, str) and hints[name][0] == list[str]
            given[name] = [value] if alone else value
            parser.add_argument(f"--{name}", type=hints[name][0])
    try:
        return kind(**vars(parser.parse_object(given)), **other)
    except ArgumentError as error:
        name = next(name for name in given if f'key "{name}"' in str(error))
        found = f"{file}: {where}{name} is {content[name]!r}"
        raise InputError(f"{found}; allowed: {hints[name][1]}") from error
