"""Right answers by distance: loops, and scipy's Wilson interval."""

import pytest

from ropepp.data.recall.accuracy import STREAM, distances, octaves, wilson
from ropepp.data.recall.task import RecallRows


def rows_of(length: int, pairs: int, count: int) -> RecallRows:
    return RecallRows(length, pairs, 64, count, None, 0, STREAM)


def test_distances() -> None:
    batch = rows_of(30, 4, 3).batch(range(3))
    found = distances(batch, 4)
    assert ((found > 0) == (batch["targets"] >= 0)).all()
    asked = found.nonzero().tolist()
    assert len(asked) == 12
    for b, t in asked:
        d = int(found[b, t])
        assert batch["input_ids"][b, t - d] == batch["input_ids"][b, t]
        assert (t - d) % 2 == 0
        assert t - d < 8


def test_octaves() -> None:
    for length in range(2, 300):
        longest = length - 1  # as far as two tokens of a row can be apart
        assert octaves(length) == longest.bit_length()


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 3), (37, 100), (999, 1000)])
def test_wilson_by_scipy(hits: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    ends = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert wilson(hits, n) == pytest.approx((ends.low, ends.high), abs=1e-12)


def test_rows_are_of_no_other_stream() -> None:
    own, training = rows_of(32, 4, 1), RecallRows(32, 4, 64, 100, None, 0, 0)
    ids = own.batch([0])["input_ids"]
    assert not (training.batch(range(100))["input_ids"] == ids).all(1).any()
