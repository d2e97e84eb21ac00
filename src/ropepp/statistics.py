"""Comparing variants with a baseline over the seeds that both were trained with.

The scheme of a sweep, in which every variant is compared with a baseline:

* Runs are paired by seed; the differences, variant minus baseline, are taken as normal.
* Each comparison gets the paired t-test's two-sided p and the plain 95% t interval.
* The p-values of all comparisons are adjusted by Holm's step-down method (Holm 1979, Scand. J.
  Statist. 6, 65-70), so that the chance of one false claim or more in the sweep is at most 5%.
* Beside the plain interval stands Bonferroni's, at 1 - 0.05 / m for m comparisons: all m hold
  together with at least 95%. It is stricter than Holm's test. A difference is called real only
  where the adjusted p is below 0.05 and neither interval has zero; the rare comparison that passes
  Holm's test alone is called just that.
* Two pairs leave one degree of freedom, at which normality is all there is: never called real.

A sign-flip test, which needs symmetry alone, stands beside them where it can speak at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ropepp.errors import optional

ALPHA = 0.05
POWER = 0.8
FEWEST_PAIRS = 3  # for a verdict
FEWEST_FLIPS = 6  # 2 / 2^n is below 0.05 from here on
MOST_FLIPS = 22  # 2^21 sums are a matter of milliseconds
RESOLUTION = 2.0**-23  # of float32, in which the metrics are added up

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, in the metric's unit; None is what cannot be had."""

    variant: str
    seeds: tuple[int, ...]  # that both have, n of them
    # Why there is no test, if there is none. Identical: no pair differs beyond float32 rounding;
    # constant: all differ by the same amount, so that nothing tells how large chance is.
    state: Literal["tested", "no pairs", "one pair", "identical", "constant"]
    mean: float | None = None  # of the differences, variant minus baseline
    sd: float | None = None  # of the differences
    interval: Interval | None = None  # plain 95% t interval of the mean
    simultaneous: Interval | None = None  # Bonferroni's, together with the other comparisons'
    p: float | None = None  # two-sided, of the paired t-test; 1 if identical
    p_holm: float | None = None  # adjusted for the sweep's comparisons
    p_sign_flip: float | None = None  # exact and two-sided, from 6 pairs on
    # The smallest true difference that n and sd find with 80% power at a two-sided 5%, unadjusted.
    detectable: float | None = None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.seeds)

    @property
    def real(self) -> bool:
        """Whether the adjusted p and both intervals say that there is a difference."""
        return self._significant and not _has_zero(self.simultaneous)

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        if self.state == "one pair":
            return "too few seeds (smoke test)"
        if self.state == "constant":
            return "the same difference at every seed, no test"
        if self.state != "tested":
            return self.state
        if self.n < FEWEST_PAIRS:
            return "too few seeds"
        if not self._significant:
            return "no difference shown"
        side = "lower" if self.mean is not None and self.mean < 0 else "higher"
        return f"{side}, real at 5%" if self.real else f"{side} by Holm's p alone"

    @property
    def _significant(self) -> bool:
        return (
            self.n >= FEWEST_PAIRS
            and self.p_holm is not None
            and self.p_holm < ALPHA
            and not _has_zero(self.interval)
        )


def compare(
    values: Mapping[str, Mapping[int, float]], baseline: str, own: Mapping[str, str] | None = None
) -> dict[str, Comparison]:
    """Every other variant against the baseline, or its ``own``, in the order of ``values``: finite
    ones of the metric by variant and seed. An `InputError` if scipy is missing."""
    found = [
        _paired(name, given, values.get((own or {}).get(name, baseline), {}))
        for name, given in values.items()
        if name != baseline
    ]
    tested = [one for one in found if one.p is not None]
    adjusted = holm([one.p for one in tested if one.p is not None])
    for one, p in zip(tested, adjusted, strict=True):
        wide = None
        if one.state == "tested" and one.mean is not None and one.sd is not None:
            wide = t_interval(one.mean, one.sd, one.n, ALPHA / len(tested))
        found[found.index(one)] = replace(one, p_holm=p, simultaneous=wide)
    return {one.variant: one for one in found}


def t_interval(mean: float, sd: float, n: int, alpha: float = ALPHA) -> Interval:
    """Two-sided Student interval of a mean at confidence 1 - alpha, from n >= 2 values."""
    low, high = _stats().t.interval(1 - alpha, n - 1, mean, sd / math.sqrt(n))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: of the k-th smallest of m, the largest (m - i + 1) p_(i), i <= k, or 1."""
    m = len(p_values)
    adjusted, largest = [0.0] * m, 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, (m - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of the mean difference under random signs (Fisher's permutation test of
    pairs): the share of the 2^n ways to sign the differences whose sum is at least as far from 0.

    None for fewer than 6 pairs, which cannot come below 0.05, and above 22, too many to enumerate.
    """
    n = len(differences)
    if not FEWEST_FLIPS <= n <= MOST_FLIPS:
        return None
    # With all signs turned round a sum has the same size, so the first may stay as it is.
    sums = np.array([differences[0]])
    for difference in differences[1:]:
        sums = np.concatenate((sums + difference, sums - difference))
    observed = abs(math.fsum(differences))
    # Sums that are equal on paper differ in rounding.
    slack = 1e-12 * math.fsum(abs(difference) for difference in differences)
    return float(np.mean(np.abs(sums) >= observed - slack))


def power(shift: float, n: int) -> float:
    """Probability that a two-sided paired t-test of n >= 2 pairs finds p < 0.05; ``shift`` is the
    noncentrality, the true mean difference in units of its standard error."""
    limit, above = _stats().t.ppf(1 - ALPHA / 2, n - 1), _stats().nct.sf
    return float(above(limit, n - 1, shift) + above(limit, n - 1, -shift))


def detectable_difference(sd: float, n: int) -> float:
    """Smallest true mean difference that a paired t-test at a two-sided 5% finds with 80% power
    (Cohen, Statistical Power Analysis, 1988), if ``sd`` is the differences' true one."""
    _stats()
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    shift = brentq(lambda shift: power(shift, n) - POWER, 0.0, 1000.0, rtol=1e-4)
    return float(shift) * sd / math.sqrt(n)


def sample_sd(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1 in the denominator; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation within groups, and its degrees of freedom; None without two values."""
    freedom = sum(len(group) - 1 for group in groups if group)
    if not freedom:
        return None
    squares = sum(float(np.sum(np.square(np.subtract(g, np.mean(g))))) for g in groups if len(g))
    return math.sqrt(squares / freedom), freedom


def decimals(sd: float | None, value: float = 1.0) -> int:
    """Decimals for two significant digits of ``sd``, or, without one, for five of ``value``."""
    if sd is not None and sd > 0:
        return min(8, max(0, 1 - math.floor(math.log10(sd))))
    return min(8, max(0, 4 - math.floor(math.log10(abs(value))))) if value else 4


def _paired(variant: str, own: Mapping[int, float], reference: Mapping[int, float]) -> Comparison:
    """One comparison, without what depends on the others."""
    seeds = tuple(sorted(own.keys() & reference.keys()))
    n = len(seeds)
    if not n:
        return Comparison(variant, seeds, "no pairs")
    differences = [own[seed] - reference[seed] for seed in seeds]
    rounding = RESOLUTION * max(max(abs(own[s]), abs(reference[s])) for s in seeds)
    mean, sd = math.fsum(differences) / n, sample_sd(differences)
    if sd is None:
        return Comparison(variant, seeds, "one pair", mean)
    if max(abs(difference) for difference in differences) <= rounding:
        return Comparison(variant, seeds, "identical", mean, sd, p=1.0)
    if sd <= rounding:
        return Comparison(variant, seeds, "constant", mean, sd)
    return Comparison(
        variant,
        seeds,
        "tested",
        mean,
        sd,
        interval=t_interval(mean, sd, n),
        p=float(_stats().ttest_1samp(differences, 0).pvalue),
        p_sign_flip=sign_flip_p(differences),
        detectable=detectable_difference(sd, n),
    )


def _has_zero(interval: Interval | None) -> bool:
    return interval is None or interval[0] <= 0 <= interval[1]


def _stats() -> Any:
    """scipy.stats, which costs a second to import and comes with an extra."""
    return optional("scipy.stats")
