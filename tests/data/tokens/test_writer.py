from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ropepp.data.tokenizer import BytesTokenizer
from ropepp.data.tokens.writer import TokenWriter, token_type
from ropepp.errors import InputError
from ropepp.files import DiskError


def test_a_document_in_pieces_is_that_document(tmp_path: Path) -> None:
    for name, cuts in (("whole", [0, 9]), ("pieces", [0, 0, 2, 5, 9])):
        (tmp_path / name).mkdir()
        with TokenWriter(tmp_path / name, BytesTokenizer()) as files:
            files.append([1], 1)
            files.begin()
            for a, b in pairwise(cuts):
                files.extend(list(range(a, b)))
            files.finish(9)
            files.sync()
            counts = files.counts_and_checksums()
        assert counts["tokens"] == 12
        for file in ("tokens.bin", "offsets.bin", "tokens.crc32"):
            content = (tmp_path / name / file).read_bytes()
            assert content == (tmp_path / "whole" / file).read_bytes()


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, BytesTokenizer()) as files:
        with pytest.raises(InputError, match="gave the id 1048576; ids must be from 0 to below"):
            files.append([1, 1 << 20], 1)
        files.append([257], 1)
        message = r"gave the id 257; .* below 257, its vocab_size \(16 bits in the file"
        with pytest.raises(InputError, match=message):
            files.sync()


def test_the_type_follows_the_vocabulary() -> None:
    assert [token_type(size) for size in (257, 65536, 65537, 2**32)] == [
        *(np.uint16, np.uint16, np.uint32, np.uint32)
    ]
    with pytest.raises(InputError, match=f"vocab_size {2**32 + 1}; allowed are up to {2**32}"):
        token_type(2**32 + 1)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").symlink_to("/dev/full")
    with TokenWriter(tmp_path, BytesTokenizer()) as files:
        files.append([1, 2], 2)
        with pytest.raises(DiskError) as caught:
            files.sync()
    assert f"{tmp_path}/tokens.bin cannot be written: No space left on device" in str(caught.value)
    assert str(caught.value).endswith("; free some space")
