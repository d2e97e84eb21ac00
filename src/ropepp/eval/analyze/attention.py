"""``ropepp analyze attention``: do real and imaginary heads look at different places?

Two kinds of chance are told apart. Over *texts*: rows are drawn again (percentile bootstrap), which
says what other texts would show of these very heads. Over *heads*: any two groups of trained heads
differ on enough text, so the pairs of a real and an imaginary head that share a query projection
are compared as well (Student interval over all pairs of all layers); only that says something about
kinds of heads. Neither says what another training seed would give.
"""

from argparse import Namespace
from itertools import zip_longest
from typing import Any

import numpy as np

from ropepp.errors import InputError
from ropepp.eval.analyze.attention_maps import MEASURES, AttentionMaps, attention_maps, draw
from ropepp.eval.analyze.heads import head_pairs, kinds_of
from ropepp.eval.analyze.output import Floats, save
from ropepp.eval.analyze.rows import read_rows
from ropepp.interop.saved import SavedModel
from ropepp.model.heads import HeadLayout
from ropepp.statistics import ALPHA, sample_sd, t_interval

FEWEST_ROWS = 8  # to draw again from: of fewer a bootstrap is not to be trusted
RESAMPLES = 10_000
DIFFERENCE = "imaginary - real"
PAIRED = "imaginary - real, over pairs of heads"


def bootstrap(values: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Means (resamples, ...) over rows (rows, ...) that are drawn again with replacement (Efron,
    Ann. Statist. 7, 1979); what rows have in common stays together."""
    n = len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    counts = np.stack([np.bincount(one, minlength=n) for one in drawn])
    return np.tensordot(counts / n, values, axes=1)


def percentiles(means: Floats, alpha: float = ALPHA) -> tuple[Floats, Floats]:
    """Ends of the two-sided percentile interval at confidence 1 - alpha."""
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2], axis=0)
    return low, high


def compare_kinds(maps: AttentionMaps, layout: HeadLayout, seed: int = 0) -> list[dict[str, Any]]:
    """A table of all measures, of each kind of head and of the difference imaginary - real, from at
    least 8 rows: lines with ``layer`` ("all", or from 1), ``kind``, ``measure``, ``mean``, the
    plain 95% interval ``low`` and ``high``, and for differences ``wide_low`` and ``wide_high``, at
    Bonferroni's 1 - 0.05 / m for the m differences over texts in the table, which hold together
    with 95%."""
    kinds = kinds_of(layout)
    by_head = maps.by_head.numpy()  # (rows, L, H, measures)
    groups = {kind: by_head[:, :, heads].mean(2) for kind, heads in kinds.items()}
    if {"real", "imaginary"} <= groups.keys():
        groups[DIFFERENCE] = groups["imaginary"] - groups["real"]
    layers = ["all", *range(1, by_head.shape[1] + 1)]
    m = len(layers) * len(MEASURES)
    table = []
    for kind, by_layer in groups.items():
        values = np.concatenate([by_layer.mean(1, keepdims=True), by_layer], axis=1)
        means = bootstrap(values, seed=seed)
        plain, wide = percentiles(means), percentiles(means, ALPHA / m)
        for i, layer in enumerate(layers):
            for j, measure in enumerate(MEASURES):
                mean = float(values[:, i, j].mean())
                ends = [float(x[i, j]) for x in (plain if kind != DIFFERENCE else (*plain, *wide))]
                table.append(_line(layer, kind, measure, mean, ends))
    return table + _over_pairs(by_head.mean(0), head_pairs(layout))


def _over_pairs(by_head: Floats, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Differences within pairs of heads of all layers, (L, H, measures), as a sample."""
    if len(pairs) * len(by_head) < 3:
        return []
    real, imaginary = (list(heads) for heads in zip(*pairs, strict=True))
    differences = (by_head[:, imaginary] - by_head[:, real]).reshape(-1, len(MEASURES))
    table = []
    for measure, values in zip(MEASURES, differences.T, strict=True):
        mean, sd, n = float(values.mean()), sample_sd(values.tolist()) or 0.0, len(values)
        wide = t_interval(mean, sd, n, ALPHA / len(MEASURES))
        table.append(_line("all", PAIRED, measure, mean, [*t_interval(mean, sd, n), *wide]))
    return table


def _line(layer: Any, kind: str, measure: str, mean: float, ends: list[float]) -> dict[str, Any]:
    named = zip_longest(("low", "high", "wide_low", "wide_high"), ends)
    return {"layer": layer, "kind": kind, "measure": measure, "mean": mean} | dict(named)


def analyze(saved: SavedModel, options: Namespace) -> None:
    """The command; see ``ropepp analyze attention --help``."""
    text = read_rows(saved, options.rows, options.length, options.text, options.tokenizer)
    if len(text.ids) < FEWEST_ROWS:
        raise InputError(
            f"there are {len(text.ids)} rows of {text.inputs.shape[1]} tokens in {text.source};"
            f" intervals need at least {FEWEST_ROWS}: give more text, or a smaller --length"
        )
    device = saved.model.embed_tokens.weight.device
    maps = attention_maps(saved.model, text.inputs.to(device))
    table = compare_kinds(maps, saved.model.layout, options.seed)
    B, T = text.inputs.shape
    facts = {
        "model": saved.name,
        "step": saved.step,
        "text": text.source,
        "unit": text.unit,
        "rows": B,
        "length": T,
        "heads_of_a_layer": maps.heads,
        "resamples": RESAMPLES,
        "seed": options.seed,
        "uniform": maps.uniform(),
    }
    print(f"{saved.name}: {B} {text.unit} of {T} tokens, {text.source}; heads {maps.heads}")
    print("\n".join(summary(table)))
    scalars: dict[str, dict[int, float]] = {}
    for line in table:
        if line["layer"] != "all":
            tag = f"attention/{line['measure']}/{line['kind']}"
            scalars.setdefault(tag, {})[line["layer"]] = line["mean"]
    figures = {"attention_maps": lambda path: draw(maps, path)}
    save(options.out, "attention", table, facts, figures, scalars)


def summary(table: list[dict[str, Any]]) -> list[str]:
    """The means over all layers, for people, marked where the wide interval leaves zero out."""
    lines = ["", f"{'mean over layers':<40} {'measure':<12} {'mean':>10}  95% interval"]
    for line in table:
        if line["layer"] == "all":
            ends = f"{line['low']:.4g} to {line['high']:.4g}"
            apart = line["wide_low"] is not None and not line["wide_low"] <= 0 <= line["wide_high"]
            mark = "  differs" if apart else ""
            lines.append(
                f"{line['kind']:<40} {line['measure']:<12} {line['mean']:>10.4g}  {ends}{mark}"
            )
    return [*lines, ""]
