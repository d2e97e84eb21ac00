"""``ropepp sweep report``: what came out of a sweep and how much of it is noise.

The same blocks are written as Markdown, without plots, and as one HTML file that refers to nothing
outside; the numbers in full go to a CSV file.
"""

import base64
import csv
import html
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropepp import statistics as stats
from ropepp.files import write_text
from ropepp.runs.records import Run
from ropepp.statistics import Comparison, decimals
from ropepp.sweep.plots import Figure, Style, figures, styles
from ropepp.sweep.results import (
    MINUS,
    SweepResults,
    VariantResults,
    interval,
    load,
    number,
    p_value,
)

UNITS = {"validation_loss": " (nats per token)"}
PARAMETERS, CACHE = "parameters", "kv_cache_bytes_per_token"
FLOPS = "training_flops_per_token"
EQUAL = ("steps", "tokens", "sequence_length", "commit", "device", "world_size", "torch")


@dataclass(frozen=True)
class VariantTable:
    """Cells as text by column, a row a variant, which the first column names."""

    columns: dict[str, list[str]]
    looks: Sequence[Style]

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The cells by row."""
        return list(zip(*self.columns.values(), strict=True))


Columns = Mapping[str, Callable[[VariantResults], str]]  # how a row's cells are written


# A heading, a paragraph, a list, a table or a plot; text may hold `code`.
ReportBlock = tuple[str, str] | list[str] | VariantTable | Figure


def write_report(folder: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and ``report.csv`` into a sweep's folder.

    Returns:
        The files.

    Raises:
        InputError: The folder holds no sweep, or no finished run of one, or no run has the metric;
            or scipy or matplotlib is missing.
    """
    sweep = load(folder)
    blocks = _blocks(sweep)
    texts = {
        "report.md": _markdown(blocks),
        "report.html": _html(blocks, sweep.plan.name),
        "report.csv": _csv(sweep),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _blocks(sweep: SweepResults) -> list[ReportBlock]:
    plan = sweep.plan
    metric = plan.metric.replace("_", " ") + UNITS.get(plan.metric, "")
    return [
        ("h1", f"Sweep {plan.name}"),
        ("p", plan.question),
        _facts(sweep, metric),
        ("h2", "Before reading the numbers"),
        _warnings(sweep),
        ("h2", f"Results: {metric}, lower is better"),
        _results(sweep),
        ("p", _meaning(sweep)),
        ("h2", "How much the seeds can show"),
        _power(sweep),
        _noise(sweep),
        ("h2", "Costs"),
        _costs(sweep),
        ("p", "KV cache at 2 bytes a value. Tokens/s (median over seeds) and peak memory (the "
              "largest) are of machines that may have done other work: they measure no variant."),
        ("h2", "Plots"),
        *figures(sweep, metric),
    ]  # fmt: skip


def _facts(sweep: SweepResults, metric: str) -> list[str]:
    done = sweep.done
    finished = sorted(str(run.result.get("finished"))[:16].replace("T", " ") for run in done)
    return [
        f"Baseline: {sweep.name(sweep.plan.baseline)}. Metric: {metric}.",
        f"Runs: {len(done)} finished, {len(sweep.unfinished)} not. Tokens a run: "
        f"{_listed(done, 'tokens')}. Optimizer steps: {_listed(done, 'steps')}. Tokens in a row: "
        f"{_listed(done, 'sequence_length')}.",
        f"Finished: {' to '.join(dict.fromkeys((finished[0], finished[-1])))} UTC.",
        f"Commit: {_listed(done, 'commit')}. Device: {_listed(done, 'device')}. "
        f"torch: {_listed(done, 'torch')}.",
        f"Command: `ropepp sweep report {sweep.folder}`. Plots: `report.html`; "
        "numbers in full: `report.csv`.",
    ]


def _listed(runs: Sequence[Run], key: str) -> str:
    values = {run.result.get(key) for run in runs}
    texts = {f"{value:,}" if isinstance(value, int) else str(value) for value in values}
    return "; ".join(sorted(texts))


def _warnings(sweep: SweepResults) -> list[str]:
    """What makes the comparison weaker than it looks, the gravest first."""
    out = [_unequal(sweep.done, key) for key in EQUAL]
    if any(str(run.result.get("commit")).endswith("+") for run in sweep.done):
        out.append("Some runs had uncommitted changes (+): their code cannot be had again.")
    if sweep.baseline is None or not sweep.baseline.values:
        out.append(f"The baseline {sweep.name(sweep.plan.baseline)} has no result: no comparison.")
    for fewest, most, text in (
        (1, 1, "one seed is a smoke test; its difference may be noise alone."),
        (2, 2, "two pairs leave one degree of freedom; such an interval is hardly informative, and "
               "no difference is called real."),
        (2, 4, "fewer than 5 pairs have little power; no difference shown is no sign of equality."),
        (2, 5, "fewer than 6 pairs cannot reach p < 0.05 in a test of signs; none is given."),
    ):  # fmt: skip
        names = [sweep.name(one.variant) for one in sweep.comparisons if fewest <= one.n <= most]
        out.append(f"{', '.join(names)}: {text}" if names else "")
    if not sweep.comparisons and len(sweep.rows[0].values) < 2:
        out.append("One variant with one seed: a smoke test.")
    if sweep.plan.shared_learning_rate and len(sweep.rows) > 1:
        out.append("All variants share one learning rate, which may suit some better: a bias.")
    out += [_missing(sweep, row) for row in sweep.rows if row.comparison]
    for runs, text in (
        (sweep.unfinished, "Not finished, or failed, and left out"),
        (sweep.diverged, "Diverged (no finite value), and left out, which flatters their variants"),
    ):
        out.append(f"{text}: {', '.join(run.spec.run for run in runs)}." if runs else "")
    known = {run.spec.variant for run in [*sweep.done, *sweep.unfinished]}
    absent = [row.name for row in sweep.rows if row.variant not in known]
    out.append(f"Without any run: {', '.join(absent)}." if absent else "")
    return [line for line in out if line] or ["All runs are finished and alike."]


def _unequal(done: Sequence[Run], key: str) -> str:
    """A warning if the runs differ in ``key``, with the values and whose they are."""
    runs: dict[Any, list[str]] = {}
    for run in done:
        runs.setdefault(run.result.get(key), []).append(run.spec.run)
    if len(runs) < 2:
        return ""
    common = max(runs, key=lambda value: len(runs[value]))
    parts = [f"{common} in {len(runs.pop(common))} runs"]
    for value, names in runs.items():
        parts.append(f"{value} in {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    return f"Not an equal comparison, {key.replace('_', ' ')} differs: {'; '.join(parts)}."


def _missing(sweep: SweepResults, row: VariantResults) -> str:
    own, reference = set(row.values), set(sweep.baseline.values if sweep.baseline else ())
    if not own or not reference or own == reference:
        return ""
    alone = [
        f"{who} alone has seed {', '.join(map(str, sorted(seeds)))}"
        for who, seeds in ((row.name, own - reference), ("the baseline", reference - own))
        if seeds
    ]
    return f"{row.name} has {len(own & reference)} pairs with the baseline: {'; '.join(alone)}."


def _table(rows: Sequence[VariantResults], sweep: SweepResults, columns: Columns) -> VariantTable:
    looks = styles(sweep)
    named = {"variant": lambda row: row.name, **columns}
    cells = {name: [text(row) for row in rows] for name, text in named.items()}
    return VariantTable(cells, [looks[row.variant] for row in rows])


def _results(sweep: SweepResults) -> VariantTable:
    # One number of digits in a column, so that its numbers can be compared by eye.
    groups = [row.group for row in sweep.rows]
    pooled = stats.pooled_sd(groups)
    value = next((group[0] for group in groups if group), 0.0)
    digits = decimals(pooled[0] if pooled else None, value)
    return _table(sweep.rows, sweep, {
        "seeds": lambda row: str(len(row.group)),
        "mean": lambda row: number(row.mean, digits),
        "sd": lambda row: number(stats.sample_sd(row.group), digits),
        "difference [95%]": lambda row: _difference(row.comparison, digits),
        "Holm p": lambda row: p_value(row.compared.p_holm),
        "verdict": lambda row: row.verdict,
    })  # fmt: skip


def _meaning(sweep: SweepResults) -> str:
    tested = sum(one.p is not None for one in sweep.comparisons)
    return (
        "Differences are variant minus baseline over runs of the same seed, with the plain paired "
        f"t interval. Holm p: the paired t-test's, adjusted for all comparisons here ({tested}). "
        '"Real at 5%" needs a Holm p below 0.05, 3 pairs, and that neither this interval nor the '
        'simultaneous one below has zero. "No difference shown" does not say that there is none.'
    )


def _power(sweep: SweepResults) -> VariantTable:
    def digits(row: VariantResults) -> int:
        return decimals(row.compared.sd)

    return _table([row for row in sweep.rows if row.comparison], sweep, {
        "pairs": lambda row: str(row.compared.n),
        "sd of differences": lambda row: number(row.compared.sd, digits(row)),
        "smallest detectable": lambda row: number(row.compared.detectable, digits(row)),
        "simultaneous interval": lambda row: interval(row.compared.simultaneous, digits(row)),
        "p": lambda row: p_value(row.compared.p),
        "sign-flip p": lambda row: p_value(row.compared.p_sign_flip),
    })  # fmt: skip


def _noise(sweep: SweepResults) -> list[str]:
    out = [
        "Smallest detectable: the true difference that so many pairs with this sd find with 80% "
        "power, two-sided at 5% before adjustment. What is smaller the sweep would mostly miss.",
        "Simultaneous interval: Bonferroni's, which all hold together with 95%. p: of the paired "
        "t-test, not adjusted. Sign-flip p: exact, without assuming a normal distribution.",
    ]
    noise = stats.pooled_sd([row.group for row in sweep.rows])
    if noise:
        sd, freedom = noise
        out.append(
            f"Noise: runs of one variant have an sd over seeds of {number(sd, decimals(sd))}, "
            f"pooled ({freedom} degrees of freedom)."
        )
    controls = [one for one in sweep.comparisons if one.variant in sweep.plan.controls]
    if known := [one for one in controls if one.mean is not None]:
        names = ", ".join(f"{sweep.name(one.variant)} {_difference(one, 4)}" for one in known)
        out.append(f"Controls, equal to the baseline by construction: {names}; this is noise.")
    return out


def _difference(one: Comparison | None, digits: int) -> str:
    """In as many digits as its sd warrants, or the given number without one."""
    if one is None or one.mean is None:
        return ""
    digits = decimals(one.sd) if one.sd else digits
    mean = f"{one.mean:+,.{digits}f}".replace("-", MINUS) if one.mean else "0"
    return f"{mean} {interval(one.interval, digits)}".strip()


def _percent(sweep: SweepResults, row: VariantResults, key: str) -> str:
    own, other = row.fact(key), sweep.baseline.fact(key) if sweep.baseline else None
    if row.comparison is None or own is None or not other:
        return ""
    return f"{100 * (own / other - 1):+.1f}%".replace("-", MINUS)


def _costs(sweep: SweepResults) -> VariantTable:
    def fact(key: str, scale: float, form: str) -> Callable[[VariantResults], str]:
        return lambda row: "" if (value := row.fact(key)) is None else format(value / scale, form)

    return _table(sweep.rows, sweep, {
        "parameters": fact(PARAMETERS, 1, ",.0f"),
        "parameters to baseline": lambda row: _percent(sweep, row, PARAMETERS),
        "KV-cache bytes/token": fact(CACHE, 1, ",.0f"),
        "training GFLOP/token": fact(FLOPS, 1e9, "#.4g"),
        "FLOPs to baseline": lambda row: _percent(sweep, row, FLOPS),
        "tokens/s": lambda row: number(row.fact("tokens_per_second", statistics.median), 0),
        "peak memory, GB": fact("peak_memory_bytes", 1e9, ".2f"),
    })  # fmt: skip


def _csv(sweep: SweepResults) -> str:
    """A row a variant; numbers in full, empty where there is none."""
    records = []
    for row in sweep.rows:
        one = row.compared
        ends = {"95": one.interval, "simultaneous": one.simultaneous}
        records.append({
            "variant": row.variant,
            "name": row.name,
            "seeds": len(row.group),
            "mean": row.mean,
            "sd": stats.sample_sd(row.group),
            "pairs": one.n,
            "difference": one.mean,
            "sd_of_differences": one.sd,
            **{f"{side}_{name}": pair[at] if pair else None
               for name, pair in ends.items() for at, side in enumerate(("low", "high"))},
            **{key: getattr(one, key) for key in ("p", "p_holm", "p_sign_flip", "detectable")},
            "verdict": row.verdict,
            **{fact: row.fact(fact) for fact in (PARAMETERS, CACHE, FLOPS, "peak_memory_bytes")},
            "tokens_per_second": row.fact("tokens_per_second", statistics.median),
        })  # fmt: skip
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _markdown(blocks: Sequence[ReportBlock]) -> str:
    def safe(text: str) -> str:
        return re.sub("<(?=[a-zA-Z/!])", "&lt;", text.replace("|", "\\|").replace("\n", " "))

    parts = []
    for block in blocks:
        if isinstance(block, list):
            parts.append("\n".join(f"* {safe(item)}" for item in block))
        elif isinstance(block, VariantTable):
            rule = ["---", *["---:"] * (len(block.columns) - 1)]
            lines = [list(block.columns), rule, *block.lines]
            parts.append("\n".join(f"| {' | '.join(map(safe, line))} |" for line in lines))
        elif isinstance(block, Figure):
            parts.append(f"* {block.title} (in `report.html`)")
        else:
            parts.append({"h1": "# ", "h2": "## ", "p": ""}[block[0]] + safe(block[1]))
    return "\n\n".join(parts) + "\n"


def _html(blocks: Sequence[ReportBlock], title: str) -> str:
    """One file; a plot is an image in it, so that nothing in it can clash with another's ids."""

    def safe(text: str) -> str:
        return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))

    parts = []
    for block in blocks:
        if isinstance(block, list):
            parts.append("<ul>" + "".join(f"<li>{safe(item)}</li>" for item in block) + "</ul>")
        elif isinstance(block, VariantTable):
            parts.append(_html_table(block, safe))
        elif isinstance(block, Figure):
            image = base64.b64encode(block.svg.encode()).decode()
            parts.append(
                f"<figure><h3>{safe(block.title)}</h3>"
                f'<img alt="{html.escape(block.title)}" src="data:image/svg+xml;base64,{image}">'
                f"<figcaption>{safe(block.caption)}</figcaption></figure>"
            )
        else:
            parts.append(f"<{block[0]}>{safe(block[1])}</{block[0]}>")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body><main>\n"
    )
    return head + "\n".join(parts) + "\n</main></body></html>\n"


def _html_table(table: VariantTable, safe: Callable[[str], str]) -> str:
    rows = []
    for (name, *cells), look in zip(table.lines, table.looks, strict=True):
        named = zip(list(table.columns)[1:], cells, strict=True)
        own = [f'<td data-name="{html.escape(key)}">{safe(cell)}</td>' for key, cell in named]
        mark = f'<i style="background:{look.color}"></i>'
        rows.append(f"<tr><th>{mark}{safe(name)}</th>{''.join(own)}</tr>")
    head = "".join(f"<th>{safe(name)}</th>" for name in table.columns)
    body = "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_CSS = """
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 0; }
p, ul { max-width: 46rem; } li { margin: .2rem 0; } code { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
td { font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; } tbody th { white-space: nowrap; }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
figure { display: inline-block; width: calc(50% - 1.5rem); margin: 1rem 1rem 1rem 0;
  vertical-align: top; }
img { width: 100%; max-width: 36rem; } figcaption { font-size: .85rem; color: #555; }
@media (max-width: 700px) {
  figure { width: 100%; margin-right: 0; } thead { display: none; }
  tr, th, td { display: block; border: 0; text-align: left; } td, th { padding: .1rem 0; }
  tr { border-bottom: 1px solid #ddd; padding: .5rem 0; } tbody th { white-space: normal; }
  td:empty { display: none; } td::before { content: attr(data-name) ": "; color: #555; }
}
"""
