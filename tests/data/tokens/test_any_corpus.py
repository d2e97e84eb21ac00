"""A corpus with any damage is refused by name, or is what it was."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.any_values import MANY, accepted_or_refused, changed
from helpers.corpora import write_corpus
from ropepp.data.packing.best_fit import Long
from ropepp.data.tokens.corpus import Corpus

DOCUMENTS = [[1, 2, 3], [], [7], [200, 0, 255, 4] * 5]


def content(folder: Path) -> list[list[int]]:
    corpus = Corpus.open(folder, "train")
    corpus.verify()
    ends = corpus.offsets[:].tolist()
    return [corpus.tokens[a:b].tolist() for a, b in pairwise(ends)]


@given(data=st.data())
@settings(MANY, max_examples=60)
def test_any_bytes_in_any_file(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    write_corpus(folder, DOCUMENTS)
    expected = content(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    at = data.draw(st.integers(0, max(0, len(before) - 1)))
    how = data.draw(st.sampled_from(["other", "cut", "more", "gone", "all"]))
    if how == "gone":
        file.unlink()
    else:
        some = data.draw(st.binary(min_size=1, max_size=8))
        after = {
            "other": before[:at] + some + before[at + len(some) :],
            "cut": before[:at],
            "more": before + some,
            "all": some,
        }
        file.write_bytes(after[how])
    with accepted_or_refused():
        assert content(folder) == expected


@given(data=st.data())
@settings(MANY, max_examples=60)
def test_any_change_of_what_is_known(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    write_corpus(folder, DOCUMENTS)
    expected = content(folder)
    file = folder / "train" / data.draw(st.sampled_from(["meta.json", "shards.json"]))
    file.write_text(json.dumps(changed(json.loads(file.read_text()), data.draw)))
    with accepted_or_refused():
        assert content(folder) == expected


@given(data=st.data())
@settings(MANY, max_examples=60)
def test_any_bytes_in_a_packing(data: st.DataObject, tmp_path: Path) -> None:
    """The index beside a corpus is refused or made anew, and rows are what they were."""
    folder = tmp_path / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    write_corpus(folder, DOCUMENTS)

    def rows() -> dict[str, Any]:
        packed = Long(share=0.1).rows(Corpus.open(folder, "train"), 4)
        found = packed.batch(np.arange(len(packed)))
        return {key: value.tolist() for key, value in found.items()}

    expected = rows()
    files = sorted(path for path in folder.rglob("*.index/*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    at = data.draw(st.integers(0, max(0, len(before) - 1)))
    some = data.draw(st.binary(max_size=8))
    file.write_bytes(before[:at] + some + before[at + len(some) :])
    with accepted_or_refused():
        assert rows() == expected
