"""Token files as they are read: what is compared when, how many are open, and what a file that
changes meanwhile does."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.corpora import write_corpus
from ropepp.data.loading.loader import EpochOrder
from ropepp.data.packing.best_fit import BestFit
from ropepp.data.packing.concat import Concat
from ropepp.data.tokens import reader
from ropepp.data.tokens.corpus import Corpus
from ropepp.data.tokens.reader import ShardedTokens, load_numbers
from ropepp.data.tokens.writer import CHECKSUM_TYPE, BlockChecksums
from ropepp.errors import InputError

DTYPE = np.dtype("<u2")


def sharded(folder: Path, counts: list[int], vocab_size: int = 1 << 16) -> ShardedTokens:
    """Shards of the numbers 0, 1, 2, ..."""
    parts, begin, checksums = [], 0, b""
    for number, count in enumerate(counts):
        own = (np.arange(begin, begin + count) % (1 << 16)).astype(DTYPE)
        own.tofile(folder / f"{number}.bin")
        checksums += BlockChecksums(own).content()
        parts.append((folder / f"{number}.bin", count))
        begin += count
    return ShardedTokens(parts, DTYPE, vocab_size, np.frombuffer(checksums, CHECKSUM_TYPE))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reader", "writer", "corpus"):
        monkeypatch.setattr(f"ropepp.data.tokens.{module}.BLOCK", 8)


@settings(max_examples=100, deadline=None)
@given(slices=st.lists(st.tuples(*[st.none() | st.integers(-40, 40)] * 2), min_size=1, max_size=5))
@pytest.mark.parametrize("counts", [[30], [1, 1, 1, 20, 3, 4], [5, 25]])
def test_slices_are_those_of_one_array(
    counts: list[int],
    slices: list[tuple[int | None, int | None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (reader, sys.modules["ropepp.data.tokens.writer"]):
            patch.setattr(module, "BLOCK", 8)
        tokens, whole = sharded(tmp_path_factory.mktemp("parts"), counts), list(range(30))
        for start, stop in slices:
            found = tokens[start:stop]
            assert found.dtype == DTYPE
            assert found.tolist() == whole[start:stop]


def test_other_steps_and_other_processes(tmp_path: Path) -> None:
    tokens = sharded(tmp_path, [3, 5, 2])
    for step in (-1, 2):
        with pytest.raises(IndexError, match=f"step is {step}"):
            tokens[::step]
    assert pickle.loads(pickle.dumps(tokens))[:].tolist() == list(range(10))


def flip(file: Path, at: int) -> None:
    """In place, as a disk does."""
    with file.open("r+b") as handle:
        handle.seek(at)
        (byte,) = handle.read(1)
        handle.seek(at)
        handle.write(bytes([byte ^ 16]))


@pytest.mark.usefixtures("small_blocks")
def test_a_block_is_compared_when_first_read(tmp_path: Path) -> None:
    tokens = sharded(tmp_path, [10, 14])
    assert tokens[0:4].tolist() == [0, 1, 2, 3]
    flip(tmp_path / "1.bin", 19)  # of its third block of 8
    assert tokens[0:18].tolist() == list(range(18))
    with pytest.raises(InputError, match=r"1\.bin is damaged: bytes 16 to 23 are not what was wri"):
        tokens[17:19]
    flip(tmp_path / "1.bin", 19)
    assert tokens[17:24].tolist() == list(range(17, 24))
    flip(tmp_path / "1.bin", 19)
    with pytest.raises(InputError, match=r"1\.bin is damaged"):
        tokens.verify()


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    tokens = sharded(tmp_path, [50_000], vocab_size=40_000)
    assert len(tokens[30_000:30_010]) == 10
    with pytest.raises(InputError, match=r"0\.bin has the id 40000 at token 40000; ids must be be"):
        tokens[39_999:40_000]


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, 9000), "cut short|ends at byte"),
        (lambda file: os.truncate(file, 0), "cut short"),
        (Path.unlink, None),
        (lambda file: file.write_bytes(bytes(20_000)), "is damaged"),
        (lambda file: (file.unlink(), file.write_bytes(bytes(20_000))), None),
        (os.utime, ""),
    ],
)
def test_a_file_that_changes_while_it_is_used(
    change: Callable[[Path], object], message: str | None, evicted: bool, tmp_path: Path
) -> None:
    tokens, file = sharded(tmp_path, [10_000, 5]), tmp_path / "0.bin"
    tokens[0:10]
    change(file)
    if evicted:
        reader._opened.cache_clear()
    if message == "" or (message is None and not evicted):  # the same file, or still at hand
        assert tokens[9_000:9_003].tolist() == [9000, 9001, 9002]
    elif message == "is damaged" and not evicted:
        return  # its block is known already: no reader can tell
    else:
        with pytest.raises(InputError) as caught:
            tokens[9_000:9_003]
        assert str(file) in str(caught.value)
    assert tokens[10_000:].tolist() == list(range(10_000, 10_005))


def test_what_is_mapped_is_not_read_beyond_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To touch such a page would end the process by SIGBUS."""
    monkeypatch.setattr(reader, "IN_MEMORY", 0)
    folder = write_corpus(tmp_path, [[1] * 30] * 2000)
    for packing in (Concat(), BestFit()):
        rows = packing.rows(Corpus.open(folder, "train"), 16)
        rows.batch([3])
        mapped = [file for file in (tmp_path / "train").rglob("*.*") if file.suffix != ".json"]
        mapped = [file for file in mapped if file.is_file()]
        assert len(mapped) == (2 if packing == Concat() else 6)
        for file in mapped:
            content = file.read_bytes()
            os.truncate(file, 0)
            for read in (rows.batch, rows.num_targets):
                with pytest.raises(InputError, match=file.name):
                    read([len(rows) - 1])
            with file.open("r+b") as handle:
                handle.write(content)
        rows.batch([3])


def test_numbers_are_compared_with_their_checksum(tmp_path: Path) -> None:
    file = tmp_path / "n"
    np.arange(50_000, dtype="<i8").tofile(file)
    checksum = BlockChecksums(file.read_bytes()).digest()
    kind = np.dtype("<i8")
    assert load_numbers(file, kind, 50_000, checksum).sum() == sum(range(50_000))
    flip(file, 399_999)
    with pytest.raises(InputError, match="n is damaged: its checksum is"):
        load_numbers(file, kind, 50_000, checksum)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=8))
def test_checksums_do_not_depend_on_how_bytes_come(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropepp.data.tokens.writer.BLOCK", 16)
        content, parts = os.urandom(sum(sizes)), BlockChecksums()
        begin = 0
        for size in sizes:
            parts.update(content[begin : begin + size])
            begin += size
        whole = BlockChecksums(content)
        assert parts.content() == whole.content()
        assert len(whole.content()) == 4 * -(-len(content) // 16)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
import numpy as np
from ropepp.data.loading.loader import TrainLoader
from ropepp.data.packing.concat import Concat
from ropepp.data.tokens.corpus import Corpus
rows = Concat().rows(Corpus.open(sys.argv[1], "train"), 16)
loader = TrainLoader(rows, 8, 8, num_workers=int(sys.argv[2]))
print(sum(int(batch["input_ids"].sum()) for batch in loader))
"""


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, [[number % 256] * 17 for number in range(80)], shards=40)
    rows = Concat().rows(Corpus.open(folder, "train"), 16)
    numbers = EpochOrder(len(rows)).rows(0, -(-len(rows) // 8) * 8)
    for workers in ("0", "2"):
        command = [sys.executable, "-c", MANY, str(folder), workers, "48"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == int(rows.batch(numbers)["input_ids"].sum())
