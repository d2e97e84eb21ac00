"""Characteristic curves and the values that training shows, against sums and grids of numpy."""

import math

import numpy as np
import pytest

from ropepp.eval.analyze.curves import (
    characteristic,
    cos_range,
    coverage,
    covered,
    ranges_met,
    seen,
    sin_range,
    table_of,
)
from ropepp.model.positions import PI, RoPE, YaRN

ANGLES = [0.0, 0.3, 1.0, 1.5, 1.6, 2.5, 3.1, 3.2, 4.0, 4.7, 4.8, 7.0, 40.0]


def frequencies(position: RoPE, head_dim: int = 128) -> np.ndarray:
    return position.frequencies(head_dim).double().numpy()


def test_curves_are_means_over_frequencies() -> None:
    f = frequencies(RoPE(1e4, scaling=YaRN(8)), 32)
    d = np.array([0, 1, 7, 500, 30000], dtype=float)
    real, imaginary = characteristic(f, d)
    for i, distance in enumerate(d):
        assert real[i] == pytest.approx(sum(math.cos(x * distance) for x in f) / 16)
        assert imaginary[i] == pytest.approx(sum(math.sin(x * distance) for x in f) / 16)
    assert (real[0], imaginary[0]) == (1, 0)


def test_interpolation_stretches_the_curves() -> None:
    d = np.array([1.0, 3.0, 20.0, 300.0])
    f = frequencies(RoPE(scaling=PI(8)))
    np.testing.assert_allclose(
        characteristic(f, 8 * d), characteristic(frequencies(RoPE()), d), atol=1e-5
    )


@pytest.mark.parametrize("angle", ANGLES)
def test_ranges_by_a_grid(angle: float) -> None:
    grid = np.linspace(0, angle, 400_001)
    for found, values in ((cos_range(angle), np.cos(grid)), (sin_range(angle), np.sin(grid))):
        assert found == pytest.approx((values.min(), values.max()), abs=1e-8)


@pytest.mark.parametrize("angle", ANGLES)
def test_values_met_by_a_grid(angle: float) -> None:
    """Cells of [-1, 1] that any of the values falls into."""
    grid = np.linspace(0, angle, 2_000_001)
    cells = 2000
    values = {
        "real a": [np.cos(grid)],
        "real b": [np.sin(grid)],
        "both a": [np.cos(grid), np.sin(grid)],
        "both b": [np.sin(grid), -np.cos(grid)],
    }
    for key, ranges in ranges_met(angle).items():
        met = np.concatenate(values[key])
        share = len(np.unique(np.floor((met + 1) / 2 * cells).clip(0, cells - 1))) / cells
        assert covered(ranges) / 2 == pytest.approx(share, abs=3 / cells)


def test_covered() -> None:
    assert covered([(0.0, 1.0)]) == 1
    assert covered([(0.5, 1.0), (-1.0, -0.5)]) == 1
    assert covered([(-1.0, 0.5), (0.0, 0.25), (0.5, 1.0)]) == 2
    assert covered([(0.3, 0.3)]) == 0


def test_imaginary_heads_widen_what_is_seen() -> None:
    """With both kinds, b_n has met all of [-1, 1] after a quarter turn instead of three, and both
    signs from the start."""
    for angle in np.linspace(0.01, 7, 300):
        values = {key: covered(r) for key, r in ranges_met(angle).items()}
        assert values["both a"] >= values["real a"]
        assert values["both b"] >= values["real b"]
        assert (values["both b"] > 2 - 1e-9) == (angle >= math.pi / 2)
        assert (values["real b"] > 2 - 1e-9) == (angle >= 1.5 * math.pi)
        assert (values["both a"] > 2 - 1e-9) == (values["real a"] > 2 - 1e-9) == (angle >= math.pi)


def test_coverage() -> None:
    f = frequencies(RoPE())
    angles = f * 4095
    trained = seen(f, 4096)
    same = coverage(trained, trained)
    assert same["real a"]["full"] == pytest.approx(np.mean(angles >= math.pi))
    assert same["real b"]["full"] == pytest.approx(np.mean(angles >= 1.5 * math.pi))
    assert same["both b"]["full"] == pytest.approx(np.mean(angles >= math.pi / 2))
    assert same["real a"]["both_signs"] == pytest.approx(np.mean(angles > math.pi / 2))
    assert same["real b"]["both_signs"] == pytest.approx(np.mean(angles > math.pi))
    assert same["both b"]["both_signs"] == 1
    assert all(share["known"] == pytest.approx(1) for share in same.values())
    longer = coverage(trained, seen(f, 32768))
    assert all(share["known"] < 0.99 for key, share in longer.items() if key != "both b")
    assert longer["both b"]["known"] > longer["real b"]["known"]
    within = seen(frequencies(RoPE(scaling=PI(8))), 8 * 4095 + 1)
    assert all(s["known"] == pytest.approx(1, abs=1e-6) for s in coverage(trained, within).values())
    # By hand, for one slow pair: trained up to 0.5, used up to 1.
    one = coverage([ranges_met(0.5)], [ranges_met(1.0)])
    assert one["real b"]["known"] == pytest.approx(math.sin(0.5) / math.sin(1.0))
    assert one["real a"]["known"] == pytest.approx((1 - math.cos(0.5)) / (1 - math.cos(1.0)))


def test_table() -> None:
    f = frequencies(RoPE(), 8)
    table = table_of("x", f, f * 99)
    assert [line["pair"] for line in table] == [0, 1, 2, 3]
    assert table[1]["trained_angle"] == pytest.approx(0.1 * 99, rel=1e-6)
    assert (table[3]["cos_low"], table[3]["sin_high"]) == pytest.approx(
        (math.cos(0.099), math.sin(0.099))
    )
    assert table[0]["share_real_a"] == 1
