"""Characteristic curves of real and imaginary heads, and the position values that training shows
them (RoPE++, arXiv 2512.07525).

With f_n the frequencies and d the distance between query and key, a pair of dimensions n adds

    real head        a_n cos(f_n d) + b_n sin(f_n d)
    imaginary head   a_n sin(f_n d) - b_n cos(f_n d)

to the score, where a_n and b_n depend on what query and key say alone. If a_n = 1 and b_n = 0 on
average, the heads weigh a distance by c_re(d) = mean_n cos(f_n d) and c_im(d) = mean_n sin(f_n d).

Within a trained length, f_n d runs from 0 to x_n = f_n (length - 1). A real head alone multiplies
a_n by cos over that range and b_n by sin. Where a real and an imaginary head share a query, a_n
meets sin too, and b_n meets -cos: the paper says that this exposes queries and keys to a wider
range of positional information. `Seen` has these ranges; they are those of real angles between the
ends, not of whole distances alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Range = tuple[float, float]
CHUNK = 1 << 22  # angles at a time
FULL = 2.0 - 1e-12  # length of [-1, 1], less rounding


def characteristic(frequencies: Floats, distances: Floats) -> tuple[Floats, Floats]:
    """c_re and c_im at these distances, each (N,).

    Args:
        frequencies: (R/2,) angles per token.
        distances: (N,) tokens.
    """
    step = max(1, CHUNK // len(frequencies))
    parts = []
    for start in range(0, len(distances), step):
        angles = np.outer(distances[start : start + step], frequencies)
        parts.append((np.cos(angles).mean(1), np.sin(angles).mean(1)))
    real, imaginary = zip(*parts, strict=True)
    return np.concatenate(real), np.concatenate(imaginary)


def limit(theta: float, distances: Floats) -> tuple[Floats, Floats]:
    """What `characteristic` comes to for many dimensions, f = theta^-u with u uniform in 0 .. 1:

        c_re(d) = (Ci(d) - Ci(d / theta)) / ln theta    c_im(d) = (Si(d) - Si(d / theta)) / ln theta

    with the cosine and the sine integral.

    Args:
        theta: Base of the frequencies, above 1.
        distances: (N,) above 0; those divided by F where positions are interpolated linearly.
    """
    from scipy.special import sici  # type: ignore[import-untyped]

    near_si, near_ci = sici(distances)
    far_si, far_ci = sici(distances / theta)
    return (near_ci - far_ci) / math.log(theta), (near_si - far_si) / math.log(theta)


def cos_range(angle: float) -> Range:
    """Smallest and largest cosine of the angles from 0 to ``angle`` >= 0."""
    return (math.cos(angle) if angle < math.pi else -1.0), 1.0


def sin_range(angle: float) -> Range:
    """Smallest and largest sine of the angles from 0 to ``angle`` >= 0."""
    high = math.sin(angle) if angle < math.pi / 2 else 1.0
    low = min(0.0, math.sin(angle)) if angle < 3 * math.pi / 2 else -1.0
    return low, high


def covered(ranges: Sequence[Range]) -> float:
    """Length of the union of ranges."""
    total, end = 0.0, -math.inf
    for low, high in sorted(ranges):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


@dataclass(frozen=True)
class Seen:
    """What a pair of dimensions is multiplied with at all distances up to a length.

    Attributes:
        angle: Largest angle, f_n (length - 1).
        cos: Range of cos, by which a real head multiplies a_n.
        sin: Range of sin, by which a real head multiplies b_n, and an imaginary one a_n.
    """

    angle: float
    cos: Range
    sin: Range

    @classmethod
    def until(cls, angle: float) -> "Seen":
        """What angles from 0 to this one show."""
        return cls(angle, cos_range(angle), sin_range(angle))

    def values(self) -> dict[str, list[Range]]:
        """Values by which a_n and b_n are multiplied: by a real head alone, and by a real and an
        imaginary head that share the query."""
        negative = (-self.cos[1], -self.cos[0])
        return {
            "real a": [self.cos],
            "real b": [self.sin],
            "both a": [self.cos, self.sin],
            "both b": [self.sin, negative],
        }


def seen(frequencies: Floats, length: int) -> list[Seen]:
    """What each pair of dimensions sees in ``length`` tokens."""
    return [Seen.until(float(f) * (length - 1)) for f in frequencies]


def coverage(trained: Sequence[Seen], reached: Sequence[Seen]) -> dict[str, dict[str, float]]:
    """How wide a range training shows, for each key of `Seen.values`.

    Args:
        trained: Of each pair of dimensions in training.
        reached: Of the same when the model is used.

    Returns:
        ``full``: share of the pairs whose values fill [-1, 1]; ``both_signs``: share of those that
        met values of either sign; ``width``: mean share of [-1, 1]; ``known``: mean share of the
        reached values that training has shown.
    """
    found = {}
    for key in Seen.until(0.0).values():
        ours = [one.values()[key] for one in trained]
        theirs = [one.values()[key] for one in reached]
        widths = np.array([covered(ranges) for ranges in ours])
        reach = np.array([covered(ranges) for ranges in theirs])
        union = np.array([covered([*a, *b]) for a, b in zip(ours, theirs, strict=True)])
        shared = np.divide(widths + reach - union, reach, out=np.ones_like(reach), where=reach > 0)
        signs = [min(r[0] for r in some) < 0 < max(r[1] for r in some) for some in ours]
        found[key] = {
            "full": float(np.mean(widths >= FULL)),
            "both_signs": float(np.mean(signs)),
            "width": float(widths.mean() / 2),
            "known": float(shared.mean()),
        }
    return found


def rows(name: str, frequencies: Floats, trained: Sequence[Seen]) -> list[dict[str, Any]]:
    """A line of a table for each pair of dimensions."""
    return [
        {
            "setting": name,
            "pair": n,
            "frequency": float(f),
            "trained_angle": one.angle,
            "cos_low": one.cos[0],
            "cos_high": one.cos[1],
            "sin_low": one.sin[0],
            "sin_high": one.sin[1],
            **{
                f"share_{key.replace(' ', '_')}": covered(ranges) / 2
                for key, ranges in one.values().items()
            },
        }
        for n, (f, one) in enumerate(zip(frequencies, trained, strict=True))
    ]
