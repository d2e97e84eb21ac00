"""No position encoding (NoPE, arXiv 2305.19466): the causal mask alone tells the order."""

from dataclasses import dataclass

from ropepp.model.positions.base import Position


@dataclass(frozen=True)
class NoPE(Position):
    """Queries and keys as they are."""
