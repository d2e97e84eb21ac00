"""The table of all faults: printed, in docs/faults.md and, for programs, in docs/faults.json."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from faults_parts import BAD, SAID, Fault
from ropepp.files import write_text

KINDS = {
    "kills": "Kills and losses of power",
    "damage": "Damaged files",
    "signals": "Signals and terminals",
    "disks": "Disks",
    "hostile": "Hostile files",
    "two": "Two at once",
}
TITLE = """\
# Faults

What happens to the commands when they are broken on purpose; what they promise is in [trust.md](trust.md).
"""  # noqa: E501
ABOUT = """\
| a try counts as | |
| --- | --- |
| detected | one line said what is wrong, with the file or key, and the exit code was a documented one |
| recovered | the command, or the same one again, came to the undisturbed result: equal bytes of corpora and exports, equal curves, \
results, weights and TensorBoard steps of runs, equal tables |
| lost, silent | it did not; another result without a word, or something hostile accepted |
| executed | a payload ran, or something was written outside |
| hangs | over a minute, or processes that were left |
| tracebacks | one of them, a crash, or an exit code that [trust.md](trust.md#exit-codes) does not have |
| vague | a message that is not one line or names nothing |
| litter | temporary files that were left after the command had ended well |

Kills happen at calls that change files (opening for writing, each write, rename, unlink, mkdir, fsync and so on; every other one in the
middle of a write) and, of all processes, at any time. Where power is lost, what was never synced is gone too. Damage is a flipped bit,
zeros, truncation, another file's content, random bytes, JSON of another kind, more bytes, no file, or a folder; in text the flipped bit
is the high one of a byte: nothing notices a digit that became another one. Training does not compare `tokens.bin`, which may be
terabytes, with its checksums; `ropepp corpus verify` and `prepare` do.
"""  # noqa: E501


def rows(tries: Iterable[dict[str, Any]], faults: Iterable[Fault]) -> list[dict[str, Any]]:
    """For each fault how many tries, and of each kind of outcome."""
    counts: dict[str, Counter[str]] = {fault.key: Counter() for fault in faults}
    for one in tries:
        if one["fault"] in counts:
            counts[one["fault"]].update(["tries", *one["said"]])
    return [
        {
            "kind": fault.kind,
            "fault": fault.name,
            **{k: counts[fault.key][k] for k in ("tries", *SAID)},
        }
        for fault in faults
    ]


def table(found: list[dict[str, Any]]) -> str:
    """All rows and their sums, as Markdown."""
    columns = ("tries", *SAID)
    lines = []
    for kind, title in KINDS.items():
        own = [row for row in found if row["kind"] == kind and row["tries"]]
        if not own:
            continue
        lines += ["", f"## {title}", "", f"| fault | {' | '.join(columns)} |"]
        lines += [f"| --- {'| --: ' * len(columns)}|"]
        for row in own:
            lines.append(
                f"| {row['fault']} | {' | '.join(str(row[name] or '') for name in columns)} |"
            )
        lines.append(f"| **all** | {' | '.join(str(sum(r[n] for r in own)) for n in columns)} |")
    return "\n".join(lines).strip()


def summary(found: list[dict[str, Any]]) -> str:
    """The sums in a line."""
    parts = [f"{sum(row[name] for row in found)} {name}" for name in ("tries", *SAID)]
    return ", ".join(parts)


def failures(tries: Iterable[dict[str, Any]]) -> list[str]:
    """Each try that did not go well, and how it is repeated."""
    return [
        f"* `--again '{one['fault']}/{one['index']}'`: {'; '.join(one['notes'])[:600]}"
        for one in tries
        if {*one["said"]} & {*BAD}
    ]


def write(
    out: Path, tries: list[dict[str, Any]], faults: list[Fault], about: dict[str, Any]
) -> str:
    """Writes both files; returns what is to be printed."""
    found = rows(tries, faults)
    bad = failures(tries)
    head = (
        f"`{about['command']}` on {about['machine']}, torch {about['torch']}, commit "
        f"{about['commit']}: {about['seconds'] / 60:.0f} minutes, seed {about['seed']}."
    )
    text = [TITLE, head, "", f"**{summary(found)}**", "", ABOUT, table(found)]
    if bad:
        text += ["", "## What did not go well", "", *bad]
    write_text(out, "\n".join(text) + "\n")
    content = {**about, "faults": found, "failed": [t for t in tries if {*t["said"]} & {*BAD}]}
    write_text(out.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    return "\n".join([table(found), "", *bad, "", summary(found)])
