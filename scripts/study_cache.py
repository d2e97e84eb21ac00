"""Blocks of docs/results/cache.md."""

from collections.abc import Callable

from study_length import FAR, recall_table
from study_page import Contrast, Results, Row, comparisons, cost_table, draw_paired, figure

EH = ("text", "eh", "best")
PRIMARY = [
    Contrast("C1: EH and RoPE with EH's cache, loss", EH, ("text", "one-kv", "best")),
    Contrast(
        "C2: EH and RoPE with EH's projections, cache and parameters, loss",
        EH,
        ("text", "half", "best"),
    ),
    Contrast(
        "C3: EH and RoPE with EH's cache, recall at 4x",
        ("recall", "eh", "fan-in"),
        ("recall", "half-kv", "fan-in"),
        FAR,
    ),
]
EXPLORATORY = [
    Contrast(
        "EH and RoPE with EH's cache and parameters, loss", EH, ("text", "one-kv-narrow", "best")
    ),
    Contrast("EH and RoPE with twice the cache, loss", EH, ("text", "rope", "best")),
    Contrast(
        "EH and RoPE with twice the cache, recall at 4x",
        ("recall", "eh", "fan-in"),
        ("recall", "rope", "fan-in"),
        FAR,
    ),
]


def losses(results: Results) -> str:
    """Every model of text, with what it costs."""
    rows: dict[str, Row] = {
        results.titles[v]: ("text", v, "best") for v in results.variants("text")
    }
    columns = ("cache (bytes/token)", "parameters", "training FLOPs/token")
    return cost_table(results, rows, columns)


def recall(results: Results) -> str:
    names = results.variants("recall")
    return recall_table(results, {results.titles[v]: ("recall", v, "fan-in") for v in names})


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, EXPLORATORY),
    "losses": losses,
    "recall": recall,
    "differences": figure(
        lambda results: draw_paired(results, [*PRIMARY[:2], *EXPLORATORY[:2]]),
        "differences",
        "Paired differences by seed",
    ),
}
