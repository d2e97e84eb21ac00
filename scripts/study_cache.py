"""Blocks of docs/results/cache.md."""

from collections.abc import Callable

from study_length import FAR, recall_table
from study_page import Contrast, Results, Row, comparisons, cost_table, draw_paired, figure

EH, HALF_KV = ("text-eh", "eh", "best"), ("recall", "half-kv", "fan-in")
RECALL_EH, RECALL_ROPE = ("recall-eh", "eh", "fan-in"), ("recall-eh", "rope", "fan-in")
ROPE = ("text-eh", "rope", "best")
PRIMARY = [
    Contrast("C1: EH and RoPE with EH's cache, loss", EH, ("text", "one-kv", "best")),
    Contrast(
        "C2: EH and RoPE with EH's cache, parameters and FLOPs, loss",
        EH,
        ("text", "one-kv-narrow", "best"),
    ),
    Contrast(
        "C3: EH and RoPE with EH's cache and parameters, far recall at 4x",
        RECALL_EH,
        HALF_KV,
        FAR,
    ),
]
EXPLORATORY = [
    Contrast(
        "EH and RoPE with EH's projections, cache and FLOPs, loss", EH, ("half", "half", "best")
    ),
    Contrast("EH and RoPE with twice the cache, loss", EH, ROPE),
    Contrast("RoPE with EH's cache and with twice as much, loss", ("text", "one-kv", "best"), ROPE),
    Contrast(
        "RoPE with EH's cache, parameters and FLOPs, and RoPE with twice the cache, loss",
        ("text", "one-kv-narrow", "best"),
        ROPE,
    ),
    Contrast("EH and RoPE with twice the cache, far recall at 4x", RECALL_EH, RECALL_ROPE, FAR),
]


def losses(results: Results) -> str:
    """Every model of text, with what it costs."""
    rows: dict[str, Row] = {
        results.titles[v]: (part, v, "best")
        for part in ("text-eh", "text", "half")
        for v in results.variants(part)
    }
    columns = ("cache (bytes/token)", "parameters", "training FLOPs/token")
    return cost_table(results, rows, columns)


def recall(results: Results) -> str:
    rows = {results.titles[row[1]]: row for row in (RECALL_EH, RECALL_ROPE, HALF_KV)}
    return recall_table(results, rows)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "primary": lambda results: comparisons(results, PRIMARY),
    "exploratory": lambda results: comparisons(results, EXPLORATORY),
    "losses": losses,
    "recall": recall,
    "differences": figure(
        lambda results: draw_paired(results, [*PRIMARY[:2], *EXPLORATORY[:4]]),
        "differences",
        "Paired differences by seed",
    ),
}
