"""Tables of finished runs, read from their ``result.json``."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from ropepp.errors import InputError
from ropepp.runs.records import RESULT, check_result, load_json

T = TypeVar("T")


def results(directories: Sequence[str], form: str = "md") -> str:
    """A table, of one of `FORMS`, of the finished runs in run folders, or in folders of runs such
    as logs/EXPERIMENT, in order of finishing; an `InputError` if there is no folder or no run."""
    found: dict[Path, str] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise InputError(f"{directory} is no folder; give run folders or folders of runs")
        for path in sorted(directory.rglob(RESULT), key=lambda path: path.lstat().st_mtime):
            name = path.parent.relative_to(directory)
            found.setdefault(path, str(name) if name.parts else path.parent.name)
    rows = read_rows((name, path) for path, name in found.items())
    if not rows:
        raise InputError(f"no finished run (result.json of fit) in {', '.join(directories)}")
    return FORMS[form](rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """All that results say in single values, a line a run; inner keys are joined by dots."""
    return to_csv([dict(_flat(row)) for row in rows])


def to_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as text, after a line of all their keys; nothing where a value is None or missing."""
    text = StringIO()
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif not isinstance(value, list):
            yield before + key, value


def as_json(rows: list[dict[str, Any]]) -> str:
    """The results themselves, with each run's name."""
    return json.dumps(rows, indent=2) + "\n"


def read_rows(named: Iterable[tuple[str, Path]]) -> list[dict[str, Any]]:
    """Rows of a table, each a run's name and its ``result.json``; what is damaged, or of another
    program, is left out, and standard error says so."""
    rows: list[dict[str, Any]] = []
    for name, path in named:
        try:
            row = {**load_json(path, check_result), "run": name}
            table([row])  # it has all that a table needs
            rows.append(row)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            print(f"left out: {path} is no result of a run ({reason})", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a run; says how little one seed of a variant can show. Lengths and budgets
    are columns where they differ, and so are evaluations at more lengths where there are some."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "run": lambda row: row["run"],
        "variant": lambda row: row["variant"],
        "seed": lambda row: str(row["seed"]),
        "parameters": lambda row: f"{row['parameters']:,}",
        "KV-cache bytes/token": lambda row: f"{row['kv_cache_bytes_per_token']:,}",
        "row": lambda row: f"{row['sequence_length']:,}",
        "steps": lambda row: f"{row['steps']:,}",
        "tokens": lambda row: f"{row['tokens']:,}",
        "validation loss": lambda row: number(row["validation_loss"], ".4f"),
        "perplexity": lambda row: number(row["validation_perplexity"], ".2f"),
        "longer rows": longer_rows,
        "tokens/s": lambda row: f"{rate:,.0f}" if (rate := row["tokens_per_second"]) else "",
    }
    if len(budgets(rows)) < 2:
        del columns["row"], columns["steps"], columns["tokens"]
    if not any(map(longer_rows, rows)):
        del columns["longer rows"]
    return "\n".join([markdown_table(rows, columns, left=2), "", *notes(rows)]) + "\n"


def number(value: float | None, form: str) -> str:
    """A number of a result as text; of one that was not finite, `null` in the file, a word."""
    return "diverged" if value is None else f"{value:{form}}"


FORMS = {"md": table, "csv": as_csv, "json": as_json}


def markdown_table(
    rows: Sequence[T], columns: Mapping[str, Callable[[T], str]], left: int = 1
) -> str:
    """A table in Markdown of a line for each of ``rows``; ``columns`` say how its cells are
    written, the first ``left`` are aligned left, the others are numbers."""
    rule = [*["---"] * left, *["---:"] * (len(columns) - left)]
    cells = [[escaped(text(row)) for text in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), rule, *cells])


def escaped(text: str) -> str:
    """A line of Markdown in which nothing but code in backticks is markup: no HTML, no link."""
    text = re.sub(r"([|*]|\](?=\s*[(\[:]))", r"\\\1", text.replace("\n", " "))
    return re.sub("<(?=[a-zA-Z/!])", "&lt;", text)


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before comparing: seeds, budget, machine."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row["variant"], set()).add(row["seed"])
    out = []
    if min(len(own) for own in seeds.values()) < 2:
        out.append(
            "Smoke test: one seed a variant. It shows that training works; "
            "differences of this size may be noise."
        )
    if len(budgets(rows)) == 1:
        _, steps, tokens = budgets(rows).pop()
        out.append(f"Each run: {tokens:,} tokens in {steps:,} steps.")
    else:
        out.append("The runs differ in tokens or steps: not an equal comparison.")
    machines = "; ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in rows}))
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    out.append(f"KV cache at 2 bytes a value. {machines}; commit {commits}.")
    return out


def budgets(rows: list[dict[str, Any]]) -> set[tuple[int, int, int]]:
    """Tokens in a row, steps, and tokens in all."""
    return {(row["sequence_length"], row["steps"], row["tokens"]) for row in rows}


def longer_rows(row: dict[str, Any]) -> str:
    """The losses at other lengths than the trained one."""
    losses = {
        found[1]: value
        for key, value in row["evaluation"].items()
        if (found := re.fullmatch(r"validation_(.*)/loss", key))
    }
    return ", ".join(f"{name} {number(value, '.3f')}" for name, value in losses.items())
