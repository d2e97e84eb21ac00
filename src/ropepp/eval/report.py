"""What an evaluation leaves in its folder: one table of all models, as Markdown, CSV and JSON."""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.eval.evaluated_model import EvaluatedModel
from ropepp.eval.scores import Score, markdown
from ropepp.files import DiskError, disk_errors, printable, write_json, write_text
from ropepp.model.flops import num_parameters
from ropepp.runs.machine import provenance
from ropepp.runs.table import to_csv

TABLES = ("evaluation.md", "evaluation.csv", "evaluation.json")
SETTINGS = (
    "lengths", "samples", "stride", "protocol", "seed", "dtype", "device", "batch_tokens",
)  # fmt: skip


class Report:
    """All that is known so far; ``left_out`` has what is left out, and why."""

    def __init__(self, options: Namespace, left_out: dict[str, str]) -> None:
        self.out: Path = options.out
        self.left_out = left_out
        self.settings = {name: getattr(options, name) for name in SETTINGS}
        asked = {name: getattr(options, name) for name in ("models", "suite", "tasks", "tokenizer")}
        asked["data"] = options.data and str(options.data)
        asked["text"] = [str(path) for path in options.text]
        self.asked = {**asked, **self.settings}
        self.written = False
        self.models: dict[str, dict[str, Any]] = {}  # by the names that tables have for them
        self.rows: list[Score] = []
        self.curves: list[dict[str, Any]] = []

    def add(
        self, subject: EvaluatedModel, rows: Sequence[Score], curves: Sequence[dict[str, Any]]
    ) -> None:
        """Adds what was found of a model."""
        self.models[subject.name] = {
            "path": str(subject.saved.path),
            "step": subject.saved.step,
            "variant": type(subject.model.position).__name__,
            "parameters": num_parameters(subject.model),
            "tokenizer": subject.tokenizer.fingerprint,
            "identity": subject.identity,
        }
        self.rows += rows
        self.curves += curves
        odd = [row for row in rows if not math.isfinite(row.value)]
        if odd:
            what = f"{odd[0].task}, {odd[0].metric}"
            print(
                f"{subject.name}: {len(odd)} values are no finite numbers, the first of {what}: "
                "the weights may be damaged, or the training has diverged",
                file=sys.stderr,
            )

    def text(self) -> str:
        """The table for people; an `InputError` if there is nothing in it."""
        if not self.rows:
            raise InputError("; ".join(f"{a}: {why}" for a, why in self.left_out.items()))
        notes = [
            "± is one standard error over items (windows of a text, questions, samples); shares are"
            " in percent, perplexities and nats as they are.",
            *(f"{name}: {one['path']}, step {one['step']}" for name, one in self.models.items()),
            *(f"left out: {what}: {reason}" for what, reason in self.left_out.items()),
            ", ".join(
                f"{key} {value}" for key, value in self.settings.items() if value is not None
            ),
        ]
        return markdown(self.rows, notes)

    def write(self, complete: bool) -> DiskError | None:
        """Writes the tables, if there is anything to write; what went wrong. What an earlier
        evaluation has left stays until this one is complete."""
        there = not self.written and any((self.out / name).exists() for name in TABLES)
        if not self.rows or (there and not complete):
            return None
        results = [asdict(row) for row in self.rows]
        content = {
            "settings": self.settings,
            "asked": self.asked,
            "versions": provenance(),
            "models": self.models,
            "left_out": self.left_out,
            "results": results,
            "loss_by_position": self.curves,
        }
        table, figures, everything = (self.out / name for name in TABLES)
        try:
            with disk_errors(self.out):
                if there:
                    self._keep_others()
                write_text(table, self.text())
                write_text(figures, to_csv(results))
                write_json(everything, content)
        except DiskError as error:
            return error
        self.written = True
        return None

    def _keep_others(self) -> None:
        """Gives tables of another evaluation other names."""
        try:
            old = json.loads((self.out / TABLES[-1]).read_bytes())
            known = {name: one["identity"] for name, one in old["models"].items()}
            same = old["asked"] == json.loads(json.dumps(self.asked)) and all(
                known.get(name, one["identity"]) == one["identity"]
                for name, one in self.models.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            same = False
        if same:
            return
        number = 1
        while any(self._aside(name, number).exists() for name in TABLES):
            number += 1
        for name in TABLES:
            if (self.out / name).exists():
                (self.out / name).rename(self._aside(name, number))
        kept = printable(self._aside(TABLES[0], number))
        print(f"the tables of another evaluation are kept: {kept}", file=sys.stderr)

    def _aside(self, name: str, number: int) -> Path:
        file = self.out / name
        return file.with_name(f"{file.stem}-{number}{file.suffix}")
