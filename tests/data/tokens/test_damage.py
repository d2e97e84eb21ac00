"""Any damage of any file of a prepared corpus is named, or changes no batch."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.corpora import run
from helpers.make_tree import make_tree
from ropepp.data.packing.best_fit import BestFit
from ropepp.data.packing.concat import Concat
from ropepp.data.prepare.inspect import inspect, verify
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

DAMAGES = ["flip", "cut", "longer", "empty", "gone", "folder", "other", "random"]
Prepared = tuple[Path, list[Path], list[torch.Tensor]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A corpus of three shards, with bad lines, a trained tokenizer and an index of its packing;
    its files and its batches."""
    folder = tmp_path_factory.mktemp("damage")
    out = run(make_tree(folder / "tree", 9_000, shards=3), folder / "out", "bpe", vocab_size=300)
    expected = batches(out)
    return out, sorted(path for path in out.rglob("*") if path.is_file()), expected


def batches(folder: Path) -> list[torch.Tensor]:
    """All that training and validation read."""
    found = []
    for split, packing in (("train", Concat()), ("train", BestFit()), ("validation", Concat())):
        rows = packing.rows(Corpus.open(folder, split), 64)
        found += [value for _, value in sorted(rows.batch(np.arange(len(rows))).items())]
    return found


def damage(file: Path, kind: str, draw: st.DataObject, others: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    place = draw.draw(st.integers(0, max(len(content) - 1, 0)))
    other = draw.draw(st.sampled_from(others)).read_bytes() if kind == "other" else b""
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "gone":
        if kind == "flip" and content:
            content[place] ^= 1 << draw.draw(st.integers(0, 7))
        if kind == "random":
            content[place : place + 8] = draw.draw(st.binary(min_size=8, max_size=8))
        made = {"cut": content[:place], "longer": content + b"7", "empty": b"", "other": other}
        file.write_bytes(made.get(kind, content))


def refusal(read: Callable[[], object]) -> str:
    """What is wrong, in a line, or nothing; anything else than an `InputError` fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an index is made anew
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 (of any refusal)
            return str(error)
    return ""


@settings(max_examples=60, deadline=None)
@given(draw=st.data(), kind=st.sampled_from(DAMAGES))
def test_damage_is_named_or_changes_nothing(
    draw: st.DataObject, kind: str, prepared: Prepared
) -> None:
    out, files, expected = prepared
    file = draw.draw(st.sampled_from(files))
    before = file.read_bytes()
    try:
        damage(file, kind, draw, files)
        check(file, before, out, expected)
    finally:
        if file.is_dir():
            file.rmdir()
        file.write_bytes(before)


def check(file: Path, before: bytes, out: Path, expected: list[torch.Tensor]) -> None:
    # The last line end is no content.
    end = b"\n" if file.name in ("meta.json", "key.json") else b""
    changed = not file.is_file() or file.read_bytes() not in (before, before.removesuffix(end))
    found: list[torch.Tensor] = []
    message = refusal(lambda: found.extend(batches(out)))
    in_index = file.parent.name.endswith(".index")
    if message:
        assert changed
        assert not in_index
        assert file.name in message
    else:
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    if changed and not in_index:
        assert file.name in refusal(lambda: verify(out))
    refusal(lambda: inspect(out))


def test_shards_that_changed_places(prepared: Prepared, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(prepared[0], copy)
    first, second, _ = sorted((copy / "shards").iterdir())
    for one, other in ((first, copy / "aside"), (second, first), (copy / "aside", second)):
        one.rename(other)
    with pytest.raises(InputError, match=first.name):
        batches(copy)
