"""Comparisons against scipy's own, against brute force, and in the corner cases of few seeds."""

from itertools import chain, combinations, product

import numpy as np
import pytest
from scipy import integrate, stats

from ropepp.statistics import (
    Comparison,
    compare,
    decimals,
    detectable_difference,
    holm,
    pooled_sd,
    power,
    sign_flip_p,
)
from ropepp.sweep.results import interval, number, p_value


def runs(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def one(own: dict[int, float], baseline: dict[int, float]) -> Comparison:
    return compare({"rope": baseline, "ec": own}, "rope")["ec"]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_t_test_and_intervals_are_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    baseline = runs(*random.normal(5, 0.1, n))
    values = {"rope": baseline} | {
        name: runs(*random.normal(5.02, 0.1, n)) for name in ("a", "b", "c")
    }
    compared = compare(values, "rope")
    assert list(compared) == ["a", "b", "c"]
    for name, found in compared.items():
        test = stats.ttest_rel(list(values[name].values()), list(baseline.values()))
        assert found.n == n
        assert found.p == pytest.approx(test.pvalue, rel=1e-9)
        assert found.interval == pytest.approx(test.confidence_interval(0.95), rel=1e-9)
        wide = test.confidence_interval(1 - 0.05 / 3)
        assert found.simultaneous == pytest.approx(wide, rel=1e-9)
    ps = [found.p for found in compared.values() if found.p is not None]
    assert [found.p_holm for found in compared.values()] == pytest.approx(closed_testing(ps))


def closed_testing(ps: list[float]) -> list[float]:
    """A hypothesis's adjusted p is the largest Bonferroni p of all sets that it is in."""
    every = range(len(ps))
    sets = list(chain.from_iterable(combinations(every, size) for size in range(1, len(ps) + 1)))
    joint = {own: min(1.0, len(own) * min(ps[i] for i in own)) for own in sets}
    return [max(joint[own] for own in sets if i in own) for i in every]


def test_holm_is_closed_testing() -> None:
    random = np.random.default_rng(0)
    for m in range(1, 8):
        for _ in range(20):
            ps = list(random.random(m) ** 3)
            ps[0] = ps[-1]  # a tie
            assert holm(ps) == pytest.approx(closed_testing(ps))
    assert holm([]) == []


@pytest.mark.parametrize("n", [6, 7, 10])
def test_sign_flip_is_enumeration(n: int) -> None:
    random = np.random.default_rng(n)
    for shift in (0.0, 0.5, 5.0):
        differences = list(np.round(random.normal(shift, 1, n), 1))  # rounded: with ties
        sums = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=n)
        ]
        expected = np.mean([total >= abs(sum(differences)) - 1e-9 for total in sums])
        assert sign_flip_p(differences) == pytest.approx(expected)


def test_sign_flip_has_a_smallest_p() -> None:
    assert sign_flip_p([1.0, 1.1, 0.9, 1.2, 1.3, 0.8]) == 2 / 2**6 < 0.05
    assert sign_flip_p([1.0, 1.1, 0.9, 1.2, 1.3]) is None  # 2 / 2**5 is above 0.05
    assert sign_flip_p([1.0] * 23) is None
    assert sign_flip_p([1.0 + i for i in range(22)]) == 2 / 2**22


@pytest.mark.parametrize("n", [2, 3, 6, 30])
def test_power_is_an_integral(n: int) -> None:
    df = n - 1
    critical = stats.t.ppf(0.975, df)
    for shift in (0.0, 1.0, 3.0, 20.0):

        def found(root: float, shift: float = shift) -> float:
            density = stats.chi.pdf(root * np.sqrt(df), df) * np.sqrt(df)
            far = stats.norm.cdf(shift - critical * root)
            return density * (far + stats.norm.cdf(-shift - critical * root))

        expected = integrate.quad(found, 0, 8, limit=300)[0]
        assert power(shift, n) == pytest.approx(expected, abs=1e-5)
    delta = detectable_difference(0.02, n)
    assert power(delta * np.sqrt(n) / 0.02, n) == pytest.approx(0.8, abs=1e-3)


def test_detectable_difference_agrees_with_tables() -> None:
    """Half a standard deviation needs 34 pairs (Faul et al. 2007, G*Power)."""
    assert detectable_difference(1.0, 34) < 0.5 < detectable_difference(1.0, 33)


def test_pairs_are_the_seeds_that_both_have() -> None:
    found = one({1: 5.0, 3: 5.3, 2: 5.1, 9: 99.0}, {3: 5.0, 2: 5.0, 1: 5.0, 4: -99.0})
    assert found.seeds == (1, 2, 3)
    assert found.mean == pytest.approx(0.4 / 3)


def test_few_seeds_are_never_real() -> None:
    none, single = one({0: 1.0}, {1: 1.0}), one({0: 1.0}, {0: 9.0})
    assert (none.verdict, none.n, none.mean) == ("no pairs", 0, None)
    assert single.verdict.startswith("too few seeds")
    assert (single.interval, single.p, single.sd) == (None, None, None)
    two = one(runs(4.0, 4.0), runs(5.0, 5.0001))
    assert two.p_holm is not None
    assert two.p_holm < 0.001
    assert (two.verdict, two.real, two.p_sign_flip) == ("too few seeds", False, None)


def test_equal_runs_are_identical_and_not_significant() -> None:
    found = one(runs(5.1, 5.2, 5.3), runs(5.1, 5.2, 5.3))
    assert (found.state, found.verdict, found.mean, found.sd) == ("identical", "identical", 0, 0)
    assert (found.p_holm, found.interval, found.detectable, found.real) == (1, None, None, False)
    near = one(runs(5.1, 5.2, 5.3), runs(5.1 + 3e-7, 5.2, 5.3))  # float32 rounding
    assert near.verdict == "identical"
    assert one(runs(0.0, 0.0), runs(0.0, 0.0)).verdict == "identical"


def test_differences_without_spread_have_no_test() -> None:
    found = one(runs(5.1, 5.1, 5.1), runs(5.0, 5.0, 5.0))
    assert (found.state, found.p, found.interval, found.real) == ("constant", None, None, False)
    assert "no test" in found.verdict


def test_verdict_names_the_side() -> None:
    baseline = runs(5.0, 5.1, 5.2, 5.3)
    lower = one(runs(4.9, 5.01, 5.1, 5.21), baseline)
    higher = one(runs(5.1, 5.19, 5.3, 5.39), baseline)
    assert (lower.verdict, higher.verdict) == ("lower, real at 5%", "higher, real at 5%")
    noise = one(runs(4.9, 5.2, 5.1, 5.4), baseline)
    assert noise.verdict == "no difference shown"


def test_holm_alone_is_not_called_real() -> None:
    """The last of three steps tests at 5%, which the interval for three at once need not pass."""
    differences = np.array([-1.0, 0.0, 1.0, 0.0])
    values = {"rope": dict.fromkeys(range(4), 5.0)}
    for name, shift in (("a", 100.0), ("b", 100.0), ("c", 1.8)):
        values[name] = runs(*(5 + differences + shift))
    found = compare(values, "rope")
    assert found["a"].verdict == "higher, real at 5%"
    assert found["c"].p_holm is not None
    assert found["c"].p_holm < 0.05
    assert found["c"].interval is not None
    assert found["c"].interval[0] > 0
    assert found["c"].simultaneous is not None
    assert found["c"].simultaneous[0] < 0
    assert (found["c"].real, found["c"].verdict) == (False, "higher by Holm's p alone")


def test_real_never_has_zero_in_an_interval() -> None:
    random = np.random.default_rng(1)
    seen = set()
    for _ in range(150):
        n = int(random.integers(2, 8))
        values = {
            name: runs(*random.normal(shift, 0.05, n))
            for name, shift in (("rope", 5.0), ("a", 5.0), ("b", 5.06), ("c", 4.8))
        }
        for found in compare(values, "rope").values():
            seen.add(found.verdict)
            assert ("real" in found.verdict) == found.real
            if found.real:
                assert found.p_holm is not None
                assert found.p_holm < 0.05
                for ends in (found.interval, found.simultaneous):
                    assert ends is not None
                    assert not ends[0] <= 0 <= ends[1]
    assert len(seen) >= 4


def test_comparing_without_a_baseline() -> None:
    assert compare({"ec": runs(1.0, 2.0)}, "rope")["ec"].verdict == "no pairs"
    assert compare({"rope": runs(1.0)}, "rope") == {}


def test_pooled_sd() -> None:
    groups = [[1.0, 2.0, 3.0], [5.0], [], [10.0, 14.0]]
    assert pooled_sd(groups) == (pytest.approx(np.sqrt((2 + 8) / 3)), 3)
    assert pooled_sd([[1.0], []]) is None


def test_digits_follow_the_sd() -> None:
    digits = [decimals(sd) for sd in (0.0123, 0.5, 7.0, 120.0, 1e-30)]
    assert digits == [3, 2, 1, 0, 8]
    assert [decimals(None, value) for value in (5.8849, 123456.0, 0.0)] == [4, 0, 4]
    assert number(-0.01234, 3) == "\N{MINUS SIGN}0.012"
    assert [number(None, 3), number(0.0, 3), number(12345.0, 0)] == ["", "0", "12,345"]
    assert interval((-0.5, 0.25), 2) == "[\N{MINUS SIGN}0.50, +0.25]"
    assert [p_value(p) for p in (None, 1e-9, 0.0123, 0.5)] == ["", "<0.001", "0.012", "0.50"]
