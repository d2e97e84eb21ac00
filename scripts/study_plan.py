"""What a study's YAML asks for, and what docs/results has of it."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ropepp.errors import InputError
from study_records import Key, agree, read_records

METRIC = "validation_loss"
REQUIRED = {"name", "prepare", "base", "keys", "variants", "parts"}
OPTIONAL = {"recipes", "trust"}
PART = {
    "variants", "seeds", "cells", "grid", "best", "best_cells", "base", "set", "measure", "begin",
    "same",
}  # fmt: skip


def read_study(file: Path) -> dict[str, Any]:
    """A study's YAML; an `InputError` that names what is wrong with it."""
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {error}") from error
    _keys(content, f"{file}", REQUIRED, OPTIONAL)
    if content["name"].replace("-", "_") != file.stem:
        raise InputError(f"{file}: name is {content['name']}; allowed: the file's name")
    for part, how in content["parts"].items():
        _keys(how, f"{file}: parts.{part}", {"variants", "seeds"}, PART)
        for variant in how["variants"]:
            if variant not in content["variants"]:
                known = ", ".join(content["variants"])
                raise InputError(f"{file}: parts.{part}.variants has {variant}; allowed: {known}")
        for own in (*how.get("cells", {}).values(), *how.get("best_cells", {}).values()):
            if (name := own.get("recipe")) and name not in content.get("recipes", {}):
                raise InputError(f"{file}: parts.{part}: there is no recipe {name}")
    return content


def _keys(content: Any, where: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(content, dict) or not required <= content.keys():
        raise InputError(f"{where} needs {', '.join(sorted(required))}")
    if unknown := content.keys() - required - optional:
        allowed = ", ".join(sorted(required | optional))
        raise InputError(f"{where} has the key {sorted(unknown)[0]}; allowed: {allowed}")


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone: a variant with a cell's settings."""

    variant: str
    cell: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.cell}"


class Plan:
    """A study's YAML and the records of what has been run of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.root = file.resolve().parents[2]
        self.content = read_study(file)
        self.name: str = self.content["name"]
        self.parts: dict[str, dict[str, Any]] = self.content["parts"]
        self.logs = self.root / "logs" / "study" / self.name
        self.store = self.root / "docs" / "results" / self.name / "runs.jsonl"
        self.records: dict[Key, dict[str, Any]] = read_records(self.store)

    def rows(self, part: str) -> list[Row]:
        """The rows of a part; an `InputError` if it needs the best of parts that lack runs."""
        found = self._rows(self.parts[part])
        names = [row.name for row in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{self.file}: parts.{part} has two rows named {twice[0]}")
        return found

    def _rows(self, how: dict[str, Any]) -> list[Row]:
        found = [
            Row(variant, cell, self.with_recipe(variant, settings))
            for cell, settings in self.cells(how)
            for variant in how["variants"]
        ]
        if "best" not in how:
            return found
        over = how.get("best_cells", how.get("cells", {"best": {}}))
        found = found if "best_cells" in how else []
        best = how["best"]
        for variant in how["variants"]:
            ranked = self.ranked(best.get("variant", variant), best["of"])
            for cell, settings in ranked[: best["keep"]]:
                if best["keep"] > 1:
                    found.append(Row(variant, cell, settings))
                    continue
                found += [Row(variant, c, settings | self.long(own)) for c, own in over.items()]
        return found

    def cells(self, how: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and settings that a part states itself."""
        if "grid" in how:
            for values in itertools.product(*how["grid"].values()):
                pairs = list(zip(how["grid"], values, strict=True))
                yield "_".join(f"{key}-{value:g}" for key, value in pairs), self.long(dict(pairs))
        elif "cells" in how or "best" not in how:
            for cell, own in how.get("cells", {"today": {}}).items():
                yield cell, self.long(own)

    def with_recipe(self, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
        """A cell's settings, which come behind those of the recipe that it may name."""
        if "recipe" not in settings:
            return settings
        rest = {key: value for key, value in settings.items() if key != "recipe"}
        return self.long(self.content["recipes"][settings["recipe"]][variant]) | rest

    def long(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings by the keys of ``fit``."""
        return {self.content["keys"].get(key, key): value for key, value in settings.items()}

    def ranked(self, variant: str, of: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """A variant's cells and settings by their mean loss, of those with the most seeds."""
        losses: dict[str, list[float]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for part in of:
            for row in self.rows(part):
                if row.variant != variant:
                    continue
                if settings.setdefault(row.cell, row.settings) != row.settings:
                    raise InputError(f"{self.file}: {row.cell} of {', '.join(of)} is not the same")
                for seed in self.parts[part]["seeds"]:
                    if (part, row.name, seed) not in self.records:
                        raise InputError(f"{part} is not complete: {row.name}, seed {seed}")
                    losses.setdefault(row.cell, []).append(self.loss(part, row.name, seed))
        most = max(map(len, losses.values()))
        means = {cell: sum(own) / most for cell, own in losses.items() if len(own) == most}
        return [(cell, settings[cell]) for cell in sorted(means, key=means.__getitem__)]

    def loss(self, part: str, row: str, seed: int) -> float:
        value = self.records[part, row, seed]["result"][METRIC]
        return math.inf if value is None or not math.isfinite(value) else float(value)

    def seeds(self, part: str) -> list[int]:
        return list(self.parts[part]["seeds"])

    def wanted(self, part: str) -> set[tuple[str, str, int]]:
        """All runs of a part."""
        return {(part, row.name, seed) for row in self.rows(part) for seed in self.seeds(part)}

    def lacks(self, part: str) -> set[int]:
        """Seeds of which a part lacks a run; all if it needs the best of a part that lacks some."""
        try:
            return {seed for *_, seed in self.wanted(part) - self.records.keys()}
        except InputError:
            return set(self.seeds(part))

    def check(self, row: Row, trial: dict[str, Any]) -> None:
        """Refuses a run that was made with another value of a row's settings."""
        asked = self.content["variants"][row.variant] | row.settings
        for key, value in asked.items():
            known = trial["overrides"].get(key)
            if key in trial["overrides"] and not agree(known, value):
                raise InputError(
                    f"{self.file}: {row.name}: {key} is {value}, but {self.store} has seed "
                    f"{trial['seed']} with {known}: give the cell or the variant another name"
                )

    def check_records(self) -> None:
        """Refuses runs that are none of the study's, or were made with another value of a row's
        settings."""
        for part in dict.fromkeys(key[0] for key in self.records):
            if part not in self.parts:
                raise InputError(f"{self.store}: part {part} is not in {self.file}")
            try:
                rows = {row.name: row for row in self.rows(part)}
            except InputError:  # it needs the best of runs that are missing
                rows = {}
            for own, name, seed in self.records:
                if own == part and (seed not in self.seeds(part) or (rows and name not in rows)):
                    raise InputError(
                        f"{self.store}: {part}, {name}, seed {seed} is not in {self.file}"
                    )
                if own == part and rows:
                    self.check(rows[name], self.records[own, name, seed]["trial"])
