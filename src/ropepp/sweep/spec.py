"""A sweep's YAML: what it may say, and the rows and runs that follow from it.

Files in ``base`` and in values are relative to the YAML; ``logs`` and a relative SQLite path are
relative to the working directory, as everything that ``fit`` writes. Reading needs neither torch
nor Optuna.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from ropepp.errors import InputError
from ropepp.runs.records import Plan, Trial
from ropepp.runs.settings import (
    LAUNCHER,
    as_flag,
    canonical,
    check_launcher,
    flatten,
    label,
    launch_words,
    named_files,
    names_file,
    overlay,
    plain,
    read_files,
    read_settings,
    read_yaml,
    short_names,
)

LEARNING_RATE, MAX_STEPS, CORPUS = "model.optimizer.lr", "trainer.max_steps", "data.corpus"
OWN = ("config", "experiment", "run", "logs", "resume", "seed_everything", "ckpt_path")
METRICS = ("validation_loss", "validation_perplexity", "train_loss")
SAMPLERS, PRUNERS = ("grid", "random", "tpe"), ("none", "median", "hyperband")
PLACEHOLDERS = ("python", "args", "gpus")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
NAME_RULE = "letters, digits and . _ + -"
FIT_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Row:
    """A row of the table: runs that differ in their seed alone.

    Attributes:
        name: Its name, which is that of its folder.
        variant: The variant of the YAML that it came from.
        asked: Keys of ``fit`` and values besides ``base`` and ``set``; files are read.
        display: Its name for people.
    """

    name: str
    variant: str
    asked: dict[str, Any]
    display: str

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from other rows, short names to plain values."""
        flat = flatten(self.asked)
        names = short_names(list(flat))
        return {names[key]: plain(value) for key, value in flat.items()}

    def with_values(self, values: Mapping[str, Any], raw: Mapping[str, Any]) -> "Row":
        """The row that differs in some keys; ``raw`` has the values as they are to be named."""
        names = short_names(list(values))
        pairs = [(names[key], label(raw[key])) for key in values]
        name = self.name + "".join(f"-{key}={value}" for key, value in pairs)
        display = self.display + "".join(f", {key} {value}" for key, value in pairs)
        return Row(name, self.variant, self.asked | dict(values), display)


@dataclass(frozen=True)
class Spec:
    """A sweep as its YAML asks for it, checked as far as that is possible without ``fit``."""

    file: Path
    name: str
    question: str
    base: list[Path]
    common: dict[str, Any]  # the YAML's `set`
    variants: dict[str, dict[str, Any]]
    display: dict[str, str]
    seeds: list[int]
    baseline: str
    controls: list[str] = field(default_factory=list)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    metric: str = METRICS[0]
    sampler: str = "grid"
    trials: int = 0
    search: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    pruner: str = "none"
    pruner_options: dict[str, Any] = field(default_factory=dict)
    launcher: str = LAUNCHER
    storage: str = ""
    logs: str = "logs"

    @property
    def folder(self) -> Path:
        """Where everything of the sweep lies."""
        return Path(self.logs, self.name)

    @property
    def database(self) -> str:
        """URL of the Optuna storage."""
        return self.storage or f"sqlite:///{self.folder}/study.db"

    @cached_property
    def rows(self) -> list[Row]:
        """All variants with all combinations of the axes."""
        folder, rows = self.file.parent, []
        for variant, own in self.variants.items():
            row = Row(variant, variant, read_files(own, folder), self.display[variant])
            for values in itertools.product(*self.axes.values()):
                raw = dict(zip(self.axes, values, strict=True))
                rows.append(row.with_values(read_files(raw, folder), raw))
        return rows

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What may not change once a sweep has begun: its rows would not be comparable."""
        return {
            "base": self.read_base(),
            "set": read_files(self.common, self.file.parent),
            "metric": self.metric,
            "search": self.search,
        }

    def read_base(self) -> list[Any]:
        """Content of the base files as they are now."""
        return [read_settings(file) for file in self.base]

    def drawn(self, row: Row, params: Mapping[str, Any]) -> Row:
        """The row that a sampler's values make of ``row``."""
        values = {key: rounded(params[key], how) for key, how in self.search.items()}
        return row.with_values(values, values)

    def flat(self, row: Row) -> dict[str, Any]:
        """All settings of a row that the YAML or the base configuration gives."""
        return overlay([*self.fixed["base"], self.fixed["set"], row.asked])

    def plan(self, drawn: Sequence[Row] = ()) -> Plan:
        """The content of ``sweep.json``."""
        rates = {self.flat(row).get(LEARNING_RATE) for row in self.rows}
        searched = any(canonical(key) == LEARNING_RATE for key in self.search)
        rows = [*self.rows, *drawn]
        return Plan(
            name=self.name,
            question=self.question,
            baseline=next(r.name for r in rows if self.baseline in (r.name, r.variant)),
            metric=self.metric,
            shared_learning_rate=len(rates) == 1 and not searched,
            variants=[row.name for row in rows],
            display={row.name: row.display for row in rows},
            controls=[row.name for row in self.rows if row.variant in self.controls],
        )

    def arguments(self, trial: Trial) -> list[str]:
        """Arguments of ``fit`` for a run."""
        return [
            *(f"--config={file}" for file in self.base),
            f"--experiment={self.name}",
            f"--run={trial.run}",
            f"--logs={self.logs}",
            "--resume=auto",
            *(as_flag(key, value) for key, value in trial.overrides.items()),
            f"--seed_everything={trial.seed}",
        ]

    def command(self, trial: Trial, python: str, gpus: str) -> list[str]:
        """The command that makes a run, from the launcher's template."""
        args = self.arguments(trial)
        return launch_words(self.launcher, args, python=python, gpus=gpus)


def load(file: Path) -> Spec:
    """Reads a sweep's YAML.

    Raises:
        InputError: The file is missing or says something that is not allowed.
    """
    if not file.is_file():
        raise InputError(f"{file} is neither a sweep's YAML nor the folder of one")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: a sweep has keys such as name, base and variants")
    return _Reader(file, content).spec()


def rounded(value: Any, how: Mapping[str, Any]) -> Any:
    """A drawn value with four digits, so that its name says all of it."""
    if not isinstance(value, float) or "step" in how or "choices" in how:
        return value
    return min(max(float(f"{value:.4g}"), how["low"]), how["high"])


class _Reader:
    """Takes the YAML apart; every message begins with the file's name."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file, self.content = file, content

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.file}: {message}")

    def spec(self) -> Spec:
        allowed = ("name", "question", "base", "set", "variants", "axes", "seeds", "baseline",
                   "controls", "metric", "sampler", "trials", "search", "seed", "pruner",
                   "launcher", "storage", "logs")  # fmt: skip
        for key in self.content:
            if key not in allowed:
                self.fail(f"unknown key {key!r}; allowed: {', '.join(allowed)}")
        for key in ("name", "base", "variants"):
            if not self.content.get(key):
                self.fail(f"{key} is missing or empty")
        name = self.get("name", str, "text")
        if not NAME.fullmatch(name):
            self.fail(f"name is {name!r}; allowed: {NAME_RULE}")
        common = self.fit_keys("set", self.get("set", dict, "keys of fit and values", {}))
        variants, display = self.variants()
        spec = Spec(
            file=self.file, name=name, question=self.get("question", str, "text", ""),
            base=self.base(), common=common, variants=variants, display=display,
            seeds=self.seeds(), baseline=self.get("baseline", str, "text", next(iter(variants))),
            controls=self.get("controls", list, "a list of variants", []),
            axes=self.axes(), metric=self.metric(), search=self.search(),
            sampler=self.one_of("sampler", SAMPLERS), trials=self.get("trials", int, "a number", 0),
            seed=self.get("seed", int, "a number", 0), launcher=self.launcher(),
            storage=self.get("storage", str, "an Optuna URL", ""), **self.pruner(),
            logs=self.get("logs", str, "a folder", "logs"),
        )  # fmt: skip
        self.check_together(spec)
        return spec

    def check_together(self, spec: Spec) -> None:
        for variant, own in spec.variants.items():
            for kind, others in (("axes", spec.axes), ("search", spec.search)):
                for key in own.keys() & others.keys():
                    self.fail(f"{key} is in variants.{variant} and in {kind}: leave one of them")
        for key in spec.axes.keys() & spec.search.keys():
            self.fail(f"{key} is in axes and in search: leave one of them")
        names = [row.name for row in spec.rows]
        for name in names:
            if names.count(name) > 1:
                self.fail(f"two rows would have the name {name!r}: their values look alike")
        if spec.baseline not in (*spec.variants, *names):
            self.fail(f"baseline is {spec.baseline!r}; allowed: {', '.join(spec.variants)}")
        for name in spec.controls:
            if name not in spec.variants:
                self.fail(f"controls has {name!r}; allowed: {', '.join(spec.variants)}")
        if spec.sampler == "grid" and (spec.search or spec.trials or spec.pruner != "none"):
            self.fail("search, trials and pruner need sampler: random or tpe; a grid has axes")
        if spec.sampler != "grid" and (not spec.search or spec.trials < 1):
            self.fail(f"sampler {spec.sampler} needs search, and trials of at least 1")
        if spec.seed < 0:
            self.fail(f"seed is {spec.seed}; it must be at least 0")

    def get(self, key: str, kind: type, allowed: str, default: Any = ...) -> Any:
        value = self.content.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(f"{key} is {value!r}; allowed: {allowed}")
        return value

    def one_of(self, key: str, allowed: Sequence[str]) -> Any:
        value = self.content.get(key, allowed[0])
        if value not in allowed:
            self.fail(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
        return value

    def fit_keys(self, where: str, given: Mapping[Any, Any]) -> dict[str, Any]:
        for key, value in given.items():
            if not isinstance(key, str) or not FIT_KEY.fullmatch(key):
                self.fail(f"{where}: {key!r} is no key of fit, such as model.optimizer.lr")
            if key.partition(".")[0] in OWN:
                self.fail(f"{where}.{key}: a sweep sets {', '.join(OWN)} itself")
            for name in named_files(value):
                if not (self.file.parent / name).is_file():
                    self.fail(f"{where}.{key} is {name!r}, which is no file beside {self.file}")
        return dict(given)

    def base(self) -> list[Path]:
        given = self.content["base"]
        files = [given] if isinstance(given, str) else given
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            self.fail(f"base is {given!r}; allowed: a list of configuration files of fit")
        paths = [(self.file.parent / file).resolve() for file in files]
        for file, path in zip(files, paths, strict=True):
            if not path.is_file():
                self.fail(f"base is {file!r}, which is no file beside {self.file}")
        return paths

    def variants(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        variants, display = {}, {}
        for name, content in self.get("variants", dict, "names and their keys of fit").items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                self.fail(f"variants: {name!r} is no name; allowed: {NAME_RULE}")
            if not isinstance(content, dict | None):
                self.fail(f"variants.{name} is {content!r}; allowed: keys of fit and values")
            own = dict(content or {})
            display[name] = own.pop("display", name)
            if not isinstance(display[name], str):
                self.fail(f"variants.{name}.display is {display[name]!r}; allowed: text")
            variants[name] = self.fit_keys(f"variants.{name}", own)
        return variants, display

    def axes(self) -> dict[str, list[Any]]:
        given = self.get("axes", dict, "keys of fit and lists of values", {})
        for key, values in given.items():
            if not isinstance(values, list) or not values:
                self.fail(f"axes.{key} is {values!r}; allowed: a list of at least one value")
        return self.fit_keys("axes", given)

    def seeds(self) -> list[int]:
        given = self.content.get("seeds", [0, 1, 2])
        whole = isinstance(given, list) and all(type(seed) is int and seed >= 0 for seed in given)
        if not whole or not given or len(set(given)) < len(given):
            self.fail(f"seeds is {given!r}; allowed: a list of different whole numbers from 0 on")
        return list(given)

    def metric(self) -> str:
        value = self.get("metric", str, ", ".join(METRICS), METRICS[0])
        # With a slash: of one of the evaluation sets. What is compared must be better if smaller.
        if value not in METRICS and not re.fullmatch(r"validation.*/(loss|perplexity)", value):
            self.fail(f"metric is {value!r}; allowed: {', '.join(METRICS)}, validation.../loss")
        return value

    def search(self) -> dict[str, dict[str, Any]]:
        given = self.fit_keys("search", self.get("search", dict, "keys of fit and ranges", {}))
        for key, how in given.items():
            if not isinstance(how, dict) or not (is_range(how) or is_choice(how)):
                self.fail(
                    f"search.{key} is {how!r}; allowed: low and high, with log: true (low above 0) "
                    "or a step, or choices, a list of plain values"
                )
        return given

    def pruner(self) -> dict[str, Any]:
        given = self.content.get("pruner", PRUNERS[0])
        options = dict(given) if isinstance(given, dict) else {"name": given}
        name = options.pop("name", None)
        if name not in PRUNERS:
            self.fail(f"pruner is {given!r}; allowed: {', '.join(PRUNERS)}, or name and options")
        return {"pruner": name, "pruner_options": options}

    def launcher(self) -> str:
        text = self.get("launcher", str, "a command with {args}", LAUNCHER)
        try:
            check_launcher(text, PLACEHOLDERS)
        except InputError as error:
            self.fail(str(error))
        return text


def is_range(how: Mapping[str, Any]) -> bool:
    """Whether this says between which numbers to search."""
    ends = [how.get("low"), how.get("high"), how.get("step", 1)]
    if not set(how) <= {"low", "high", "step", "log"} or not isinstance(how.get("log", True), bool):
        return False
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        return False
    low, high, step = ends
    return low < high and step > 0 and not (how.get("log") and ("step" in how or low <= 0))


def is_choice(how: Mapping[str, Any]) -> bool:
    """Whether this says among which plain values to search."""
    values = how.get("choices")
    return (
        set(how) == {"choices"}
        and isinstance(values, list)
        and bool(values)
        and all(isinstance(one, str | int | float) and not names_file(one) for one in values)
    )
