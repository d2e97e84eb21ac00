"""``ropepp sweep report``: what came out of a sweep and how much of it is noise.

Written as Markdown, as one HTML file with plots that refers to nothing outside, in full as CSV.
"""

import base64
import html
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from markdown import markdown  # type: ignore[import-untyped]

from ropepp import statistics as stats
from ropepp.files import write_text
from ropepp.runs.records import Run
from ropepp.runs.table import escaped, markdown_table, to_csv
from ropepp.statistics import Comparison, decimals
from ropepp.sweep.plots import Figure, figures, styles
from ropepp.sweep.results import SweepResults, VariantResults, interval, load, number, p_value

UNITS = {"validation_loss": " (nats per token)"}
PARAMETERS, CACHE = "parameters", "kv_cache_bytes_per_token"
FLOPS = "training_flops_per_token"
_PAGE, _STYLE = (Path(__file__).with_name(name) for name in ("report.html", "report.css"))
EQUAL = ("steps", "tokens", "sequence_length", "commit", "device", "world_size", "torch")


def write_report(folder: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and ``report.csv`` and returns them. An `InputError` if
    there is no sweep, finished run, value of the metric, scipy or matplotlib."""
    sweep = load(folder)
    metric = sweep.plan.metric.replace("_", " ") + UNITS.get(sweep.plan.metric, "")
    text, plots = _text(sweep, metric), figures(sweep, metric)
    titles = _listing([f"{plot.title} (in `report.html`)" for plot in plots])
    texts = {
        "report.md": f"{text}\n\n{titles}\n",
        "report.html": _page(text, sweep, plots),
        "report.csv": _csv(sweep),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _text(sweep: SweepResults, metric: str) -> str:
    """The report as Markdown, up to its plots."""
    parts = [
        f"# Sweep {escaped(sweep.plan.name)}",
        escaped(sweep.plan.question),
        _listing(_facts(sweep, metric)),
        "## Before reading the numbers",
        _listing(_warnings(sweep)),
        f"## Results: {escaped(metric)}, lower is better",
        _results(sweep),
        _meaning(sweep),
        "## How much the seeds can show",
        _power(sweep),
        _listing(_noise(sweep)),
        "## Costs",
        _costs(sweep),
        "KV cache at 2 bytes a value. Tokens/s (median over seeds) and peak memory (the largest) "
        "are of machines that may have done other work: they measure no variant.",
        "## Plots",
    ]
    return "\n\n".join(parts)


def _listing(items: Sequence[str]) -> str:
    return "\n".join(f"* {escaped(item)}" for item in items)


def _facts(sweep: SweepResults, metric: str) -> list[str]:
    done = sweep.done
    finished = sorted(str(run.result.get("finished"))[:16].replace("T", " ") for run in done)
    own = ", or its row of the same values of the axes" if sweep.plan.baselines else ""
    return [
        f"Baseline: {sweep.name(sweep.plan.baseline)}{own}. Metric: {metric}.",
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
    for name in dict.fromkeys((sweep.plan.baseline, *sweep.plan.baselines.values())):
        if (found := sweep.row(name)) is None or not found.values:
            out.append(f"The baseline {sweep.name(name)} has no result: no comparison.")
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
    skipped = [run for run in sweep.done if run.result.get("skipped_steps")]
    counts = [f"{run.spec.run} {run.result['skipped_steps']}" for run in skipped]
    out.append(f"Skipped steps, which changed no weight: {', '.join(counts)}." if counts else "")
    out += [_missing(sweep, row) for row in sweep.rows if row.comparison]
    for runs, text in (
        (sweep.unfinished, "Not finished, or failed, and left out"),
        (sweep.unmeasured, f"Without a value of {sweep.plan.metric}, which was never logged"),
        (sweep.diverged, "Diverged (no finite value), and left out, which flatters their variants"),
        (sweep.gone, "Not in the YAML any more, and left out"),
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
    baseline = sweep.baseline(row)
    own, reference = set(row.values), set(baseline.values if baseline else ())
    if not own or not reference or own == reference:
        return ""
    alone = [
        f"{who} alone has seed {', '.join(map(str, sorted(seeds)))}"
        for who, seeds in ((row.name, own - reference), ("the baseline", reference - own))
        if seeds
    ]
    return f"{row.name} has {len(own & reference)} pairs with the baseline: {'; '.join(alone)}."


def _table(
    rows: Sequence[VariantResults], columns: Mapping[str, Callable[[VariantResults], str]]
) -> str:
    return markdown_table(rows, {"variant": lambda row: row.name, **columns})


def _results(sweep: SweepResults) -> str:
    # One number of digits in a column, so that its numbers can be compared by eye.
    groups = [row.group for row in sweep.rows]
    pooled = stats.pooled_sd(groups)
    value = next((group[0] for group in groups if group), 0.0)
    digits = decimals(pooled[0] if pooled else None, value)

    def baseline(row: VariantResults) -> str:
        return sweep.name(sweep.plan.baseline_of(row.variant)) if row.comparison else ""

    return _table(sweep.rows, {
        "seeds": lambda row: str(len(row.group)),
        "mean": lambda row: number(row.mean, digits),
        "sd": lambda row: number(stats.sample_sd(row.group), digits),
        **({"compared to": baseline} if sweep.plan.baselines else {}),
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


def _power(sweep: SweepResults) -> str:
    def digits(row: VariantResults) -> int:
        return decimals(row.compared.sd)

    return _table([row for row in sweep.rows if row.comparison], {
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
    return f"{number(one.mean, digits, '+')} {interval(one.interval, digits)}".strip()


def _percent(sweep: SweepResults, row: VariantResults, key: str) -> str:
    own, other = (one.fact(key) if one else None for one in (row, sweep.baseline(row)))
    if row.comparison is None or own is None or not other:
        return ""
    return f"{number(100 * (own / other - 1), 1, '+')}%"


def _costs(sweep: SweepResults) -> str:
    def fact(key: str, scale: float, form: str) -> Callable[[VariantResults], str]:
        return lambda row: "" if (value := row.fact(key)) is None else format(value / scale, form)

    return _table(sweep.rows, {
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
            "baseline": sweep.plan.baseline_of(row.variant) if row.comparison else None,
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
    return to_csv(records)


def _page(text: str, sweep: SweepResults, plots: Sequence[Figure]) -> str:
    """One file; a plot is an image in it, so that nothing in it can clash with another's ids."""
    body = markdown(text, extensions=["tables"])
    for variant, style in styles(sweep).items():
        cell = f">{html.escape(sweep.name(variant), quote=False)}</td>"
        body = body.replace(cell, f'><i style="background:{style.color}"></i>{cell[1:]}')
    for plot in plots:
        title, image = html.escape(plot.title), base64.b64encode(plot.svg.encode()).decode()
        body += (
            f'\n<figure><h3>{title}</h3><img alt="{title}" src="data:image/svg+xml;base64,{image}">'
            f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        )
    page = Template(_PAGE.read_text())
    return page.substitute(title=html.escape(sweep.plan.name), style=_STYLE.read_text(), body=body)
