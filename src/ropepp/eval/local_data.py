"""Which file of ``--data`` each benchmark reads, what it holds, and where it is published.

A file is ``FOLDER/SPLIT.jsonl``, a JSON object a line with the columns of the data set's own;
local_data.csv has them all.
"""

import csv
import json
from pathlib import Path
from typing import NamedTuple

from ropepp.errors import InputError


class BenchmarkFile(NamedTuple):
    """A benchmark's data.

    Attributes:
        folder: Below ``--data``.
        split: Name of the file, and of the split where it is published.
        columns: What each line must have.
        path: Name on the hub.
        name: Its configuration there, or None.
    """

    folder: str
    split: str
    columns: tuple[str, ...]
    path: str
    name: str | None = None

    def file(self, data: Path) -> Path:
        """Where it lies."""
        return data / self.folder / f"{self.split}.jsonl"

    def check(self, data: Path) -> Path:
        """The file, once its first line was looked at.

        Raises:
            InputError: It is missing, or lacks a column.
        """
        path = self.file(data)
        if not path.is_file():
            raise InputError(
                f"{path} is missing ({', '.join(self.columns)} a line; scripts/fetch_eval_data.py "
                "fetches it)"
            )
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        try:
            row = json.loads(line)
            absent = [column for column in self.columns if column not in row]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line 1 is no JSON object: {error}") from error
        if absent:
            raise InputError(f"{path}, line 1 has no {', '.join(absent)}; needed: {self.columns}")
        return path


class HarnessTask(NamedTuple):
    """A task of lm-eval: its YAML below ``lm_eval/tasks``, its data, and the group of the paper's
    average that it belongs to."""

    yaml: str
    source: BenchmarkFile
    group: str


def _read_table() -> tuple[dict[str, BenchmarkFile], dict[str, HarnessTask]]:
    """Texts for perplexity, which have no group, and tasks of lm-eval."""
    texts, tasks = {}, {}
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            folder, _, split = row["file"].rpartition("/")
            columns = tuple(row["columns"].split(";"))
            name = row["configuration"] or None
            source = BenchmarkFile(folder, split, columns, row["published"], name)
            if row["group"]:
                tasks[row["task"]] = HarnessTask(row["yaml"], source, row["group"])
            else:
                texts[row["task"]] = source
    return texts, tasks


TEXTS, TASKS = _read_table()

# The nine groups of the paper's average, which are the harness' own but for TruthfulQA.
GROUPS = {
    group: [name for name, task in TASKS.items() if task.group == group]
    for group in dict.fromkeys(task.group for task in TASKS.values())
}
