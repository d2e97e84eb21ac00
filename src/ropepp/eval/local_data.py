"""Which file of ``--data`` each benchmark reads, what it holds, and where it is published.

A file is ``FOLDER/SPLIT.jsonl``, a JSON object a line with the columns of the data set's own;
local_data.csv has them all.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from ropepp.data.text.readers import read_objects
from ropepp.errors import InputError


class Benchmark(NamedTuple):
    """A benchmark's data, a text for perplexity or a task of lm-eval."""

    group: str  # of the paper's average; "" for a text
    yaml: str  # of a task, below ``lm_eval/tasks``
    folder: str  # below ``--data``
    split: str  # name of the file, and of the split where it is published
    columns: tuple[str, ...]  # what each line must have
    path: str  # name on the hub
    name: str | None  # its configuration there

    def file(self, data: Path) -> Path:
        """Where it lies."""
        return data / self.folder / f"{self.split}.jsonl"

    def rows(self, data: Path) -> list[dict[str, Any]]:
        """Its lines; an `InputError` if it is missing, or a line is no object with the columns."""
        path = self.file(data)
        if not path.is_file():
            raise InputError(
                f"{path} is missing ({', '.join(self.columns)} a line; scripts/fetch_eval_data.py "
                "fetches it)"
            )
        found = []
        for place, row in read_objects(path):
            absent = [column for column in self.columns if column not in row]
            if absent:
                raise InputError(f"{place} has no {', '.join(absent)}; needed: {self.columns}")
            found.append(row)
        if not found:
            raise InputError(f"{path} is empty; it must have {', '.join(self.columns)} a line")
        return found


def _read_table() -> dict[str, Benchmark]:
    found = {}
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            folder, _, split = row["file"].rpartition("/")
            columns, name = tuple(row["columns"].split(";")), row["configuration"] or None
            found[row["task"]] = Benchmark(
                row["group"], row["yaml"], folder, split, columns, row["published"], name
            )
    return found


BENCHMARKS = _read_table()
TEXTS = {name: one for name, one in BENCHMARKS.items() if not one.group}
TASKS = {name: one for name, one in BENCHMARKS.items() if one.group}

# The nine groups of the paper's average, which are the harness' own but for TruthfulQA.
GROUPS = {
    group: [name for name, task in TASKS.items() if task.group == group]
    for group in dict.fromkeys(task.group for task in TASKS.values())
}
