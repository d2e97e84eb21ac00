"""Kinds of attention heads: "real" is phase 0, "imaginary" -90 degrees, others go by phase."""

from ropepp.model.heads import HeadLayout

NAMES = {0.0: "real", 270.0: "imaginary"}  # by phase in degrees, turned to 0..360


def kinds_of(layout: HeadLayout) -> dict[str, list[int]]:
    """Indices of a layer's heads of each kind that there is."""
    kinds: dict[str, list[int]] = {}
    for index, head in enumerate(layout.heads):
        name = NAMES.get(head.phase % 360, f"phase {head.phase:g}")
        kinds.setdefault(name, []).append(index)
    return kinds


def head_pairs(layout: HeadLayout) -> list[tuple[int, int]]:
    """Indices of real and imaginary heads that share a projection, (real, imaginary)."""
    kinds = kinds_of(layout)
    real = {layout.heads[h].projection: h for h in kinds.get("real", [])}
    imaginary = {layout.heads[h].projection: h for h in kinds.get("imaginary", [])}
    return [(real[p], imaginary[p]) for p in sorted(real.keys() & imaginary.keys())]
