from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepp.data.prepare.duplicates import find_duplicates


def hash_of(number: int) -> bytes:
    """Some agree in one half: 0 and 1, 0 and 2."""
    return (number % 2).to_bytes(8, "big") + (number // 2).to_bytes(8, "big")


@settings(max_examples=100, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 8), max_size=8), min_size=1, max_size=5),
    at_a_time=st.integers(1, 50),
)
def test_the_first_in_the_order_of_the_shards_stays(
    shards: list[list[int]], at_a_time: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, files = tmp_path_factory.mktemp("hashes"), []
    for number, shard in enumerate(shards):
        files.append(folder / str(number))
        files[-1].write_bytes(b"".join(map(hash_of, shard)))
    seen: set[int] = set()
    expected = []
    for shard in shards:
        copies = []
        for place, number in enumerate(shard):
            if number in seen:
                copies.append(place)
            seen.add(number)
        expected.append(copies)
    found = find_duplicates(files, at_a_time)
    assert [numbers.tolist() for numbers in found] == expected
    assert all(numbers.dtype == np.int64 for numbers in found)


def test_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert [numbers.tolist() for numbers in find_duplicates([tmp_path / "empty"] * 2)] == [[], []]
