"""The page that gpu_check writes, from its figures."""

import math
import subprocess
from pathlib import Path
from typing import Any

Record = dict[str, Any]
WORDS = 40  # characters beyond which words stand below a table


def text(figure: Record) -> str:
    """A value as people read it, with its unit."""
    value, unit = figure["value"], figure["unit"]
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    if value == int(value) and abs(value) < 1e6:
        number = f"{int(value)}"
    else:
        number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        number = f"{value:.1f}" if 10 <= abs(value) < 1000 else number
    return f"{number} {unit}".strip()


def page(
    command: str,
    commit: str,
    status: dict[str, str],
    figures: list[Record],
    seconds: dict[str, float],
) -> str:
    """Markdown: what ran where, how each stage ended, and a table for each kind of measurement."""
    on = next((figure["on"] for figure in figures), "nothing")
    lines = ["# On a GPU", "", f"`{command}`", f"on {on}, commit {commit}.", ""]
    lines += ["| stage | | |", "| --- | --- | ---: |"]
    lines += [
        f"| {stage} | {cell(said)} | {seconds.get(stage, 0.0):.0f} s |"
        for stage, said in status.items()
    ]
    for stage in status:
        own = [figure for figure in figures if figure["stage"] == stage]
        for kind in dict.fromkeys(figure["table"] for figure in own):
            title = f"{stage}, {kind}" if kind else stage
            part = [figure for figure in own if figure["table"] == kind]
            lines += ["", f"## {title}", "", *table(part)]
    return "\n".join(lines) + "\n"


def table(figures: list[Record]) -> list[str]:
    """A line for each measurement, a column for each of its figures; long words below."""
    short = [figure for figure in figures if len(text(figure)) <= WORDS]
    long = [figure for figure in figures if len(text(figure)) > WORDS]
    names = list(dict.fromkeys(figure["name"] for figure in short))
    found = {(figure["case"], figure["name"]): text(figure) for figure in short}
    lines = []
    if names:
        numbers = {figure["name"] for figure in short if not isinstance(figure["value"], str)}
        lines += ["| | " + " | ".join(names) + " |"]
        lines += ["| --- |" + "".join(" ---: |" if n in numbers else " --- |" for n in names)]
        for case in dict.fromkeys(figure["case"] for figure in short):
            cells = [cell(found.get((case, name), "")) for name in names]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    if lines and long:
        lines.append("")
    return lines + [f"* {f['case']}, {f['name']}: {text(f)}" for f in long]


def cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def commit(root: Path) -> str:
    """The checkout's, with ``+`` for changes; or that it is none."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
