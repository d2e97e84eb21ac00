"""Corpora of many shards: the same documents however they are prepared."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.corpora import FRACTION, documents, in_validation, run, snapshot, texts_of
from helpers.make_tree import make_tree
from helpers.raw_text import TEXTS, json_lines
from helpers.tokenizer_files import write_tokenizers
from ropepp.data.prepare import encode as shards
from ropepp.data.prepare import prepare as prepare_module
from ropepp.data.prepare import safe_cuts as pieces
from ropepp.data.prepare.prepare import prepare
from ropepp.data.text import documents as texts
from ropepp.data.text import sources
from ropepp.data.tokenizer import load_tokenizer
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

KINDS = ("bytes", "bpe", "tokenizer.json", "tokenizer.model")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5 MB in DCLM's layout with broken lines."""
    return make_tree(tmp_path_factory.mktemp("dclm") / "tree", 1_500_000, shards=6)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder, ["The state of the union. " * 20, *TEXTS], 500)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_comes_back(
    kind: str, tree: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = str(tokenizer_folder / kind) if "." in kind else kind
    out = run(tree, tmp_path / "out", given, vocab_size=400)
    expected = [text for _, text in texts_of(tree)]
    for split, inside in (("train", False), ("validation", True)):
        chosen = [text for text in expected if in_validation(text, FRACTION) == inside]
        assert documents(out, split) == chosen
        meta = Corpus.open(out, split).meta
        assert meta.documents == len(chosen)
        assert meta.text_bytes == sum(len(text.encode()) for text in chosen)
        assert (meta.shards, meta.bad_lines) == (6, 12)
        (offsets,) = [Corpus.open(out, split).offsets]
        assert (np.diff(offsets) > 0).all()
    lines = (out / "bad_lines.tsv").read_text().splitlines()
    assert len(lines) == 12
    file, line, reason = lines[0].split("\t")
    assert file == "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst"
    assert int(line) > 1
    assert reason.startswith("malformed JSON (Unterminated string starting at")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "tokenizer.model"])
def test_processes_do_not_change_a_byte(
    kind: str, tree: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = str(tokenizer_folder / kind) if "." in kind else kind
    options = {"min_tokens": 100, "vocab_size": 400}
    one, two = (
        run(tree, tmp_path / str(count), given, processes=count, **options) for count in (1, 2)
    )
    assert snapshot(one) == snapshot(two)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_short_documents_are_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "zz.jsonl").write_bytes(json_lines(["tiny", "small"]))
    try:
        out = run(tree, tmp_path / "out", min_tokens=300)
        every = [text for _, text in texts_of(tree)]
    finally:
        (tree / "zz.jsonl").unlink()
    long = [text for text in every if len(text.encode()) >= 300]
    assert len(every) > len(long) > 0
    for split, inside in (("train", False), ("validation", True)):
        chosen = [text for text in long if in_validation(text, FRACTION) == inside]
        assert documents(out, split) == chosen
        meta = Corpus.open(out, split).meta
        assert meta.short_documents == len(every) - len(long)
        # The last shard has short ones alone: no split lists it.
        assert meta.shards == 6


def test_added_shards_leave_the_others_as_they_are(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 300_000, shards=4, broken=0)
    first = run(tree, tmp_path / "out")
    before = {split: documents(first, split) for split in ("train", "validation")}
    inodes = {path: path.stat().st_ino for path in first.glob("shards/*/*/tokens.bin")}
    (tree / "a").mkdir()
    (tree / "a/new.jsonl").write_bytes(json_lines(TEXTS))
    (tree / "z.jsonl").write_bytes(json_lines(["other"]))
    second = run(tree, tmp_path / "out", overwrite=True)
    for split, texts_before in before.items():
        after = documents(second, split)
        assert [text for text in after if text in set(texts_before)] == texts_before
        assert set(after) - set(texts_before) <= {*TEXTS, "other"}
    assert Corpus.open(second, "train").meta.shards == 6
    # Taken over, not made again; the corpus before had these files too, and they are intact.
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert snapshot(second) == snapshot(run(tree, tmp_path / "again")) | {
        f"{split}/meta.json": (second / split / "meta.json").read_bytes() for split in before
    }


def test_a_single_shard(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl.gz"
    file.write_bytes(gzip.compress(json_lines(TEXTS[:7])) + gzip.compress(json_lines(TEXTS[7:])))
    out = run(file, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["shards", "train", "validation"]
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        *("meta.json", "offsets.bin", "shards.json", "tokens.bin", "tokens.crc32")
    ]
    (shard,) = (out / "shards").iterdir()
    whole = (out / "train" / "tokens.bin").read_bytes()  # for other programs
    assert whole == (shard / "train" / "tokens.bin").read_bytes()
    assert Corpus.open(out, "train").meta.name == "one"
    assert documents(out, "train") == [t for t in TEXTS if not in_validation(t, FRACTION)]


def test_small_text_files_share_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TOGETHER", 100)
    tree = tmp_path / "tree"
    for number, size in enumerate([40, 60, 1, 300, 50, 50, 1]):
        (tree / f"{number}").mkdir(parents=True)
        (tree / f"{number}/a.txt").write_text(str(number) * size)
    found = sources.find_source(str(tree)).shards()
    assert [[item.label[0] for item in shard.inputs] for shard in found] == [
        *(["0", "1"], ["2"], ["3"], ["4", "5"], ["6"])
    ]
    assert len({shard.name for shard in found}) == 5
    out = run(tree, tmp_path / "out", validation_fraction=0)
    assert [text[0] for text in documents(out, "train")] == list("0123456")


def test_names_of_shards_are_unique_and_fit_a_file_system(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/x.jsonl", "b/x.jsonl.gz", f"c/{'long' * 50}.jsonl", "d/é .jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [shard.name for shard in sources.find_source(str(tmp_path)).shards()]
    assert len(set(names)) == 5
    assert all(name.isascii() and "/" not in name and len(name) < 80 for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_are_read_and_encoded_in_pieces(
    kind: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = str(tokenizer_folder / kind) if "." in kind else kind
    tree = tmp_path / "tree"
    tree.mkdir()
    long = "Line of words, and 1,234 é more.\n\nIt's the end — of it. 你好。 " * 300
    (tree / "a.txt").write_text(long)
    (tree / "b.jsonl").write_bytes(json_lines([long[5:], "short"]))
    (tree / "c.txt").write_text(" \n" * 5000)
    options = {"vocab_size": 400, "validation_fraction": 0, "min_tokens": 10}
    whole = run(tree, tmp_path / "whole", given, **options)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "IN_MEMORY", 1000)
        patch.setattr(texts, "BLOCK", 777)
        patch.setattr("ropepp.data.text.readers.IN_MEMORY", 1000)
        patch.setattr(shards, "PIECE", 500)
        patch.setattr(pieces.pieces, "__defaults__", (500, 1000, 64))
        assert snapshot(run(tree, tmp_path / "pieces", given, **options)) == snapshot(whole)
        # Held back until it is long enough, which it never is.
        options["min_tokens"] = 10**6
        with pytest.raises(InputError, match=r"no documents for train .*, 3 short documents"):
            run(tree, tmp_path / "none", given, **options)
    assert documents(whole, "train") == [long, long[5:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces", "tree", "whole"]


@pytest.mark.parametrize("text", ["line of words\n" * 100, "word " * 100, "é" * 300, "é\n" * 150])
def test_one_long_document_is_cut_where_a_short_one_is(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.txt"
    file.write_text(text)
    short = prepare(str(file), str(tmp_path / "short"), "bytes")
    monkeypatch.setattr("ropepp.data.text.readers.IN_MEMORY", 10)
    monkeypatch.setattr(texts, "BLOCK", 7)
    assert snapshot(prepare(str(file), str(tmp_path / "long"), "bytes")) == snapshot(short)


def test_the_tokenizer_is_trained_on_a_bounded_sample(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = prepare_module.train_bpe

    def spy(found: Iterator[str], vocab_size: int) -> Any:
        seen.append(list(found))
        return real(seen[-1], vocab_size)

    monkeypatch.setattr(prepare_module, "train_bpe", spy)
    monkeypatch.setattr(prepare_module, "SAMPLED_SHARDS", 3)
    run(tree, tmp_path / "a", "bpe", vocab_size=300, sample_mb=1)
    monkeypatch.setattr(prepare_module, "_MB", 100_000)
    outs = [run(tree, tmp_path / name, "bpe", vocab_size=300, sample_mb=1) for name in "bc"]
    every = list(texts_of(tree))
    files = list(dict.fromkeys(file for file, _ in every))
    chosen = {files[number] for number in (0, 2, 4)}
    train = [(f, t) for f, t in every if f in chosen and not in_validation(t, FRACTION)]
    assert seen[0] == [text for _, text in train]
    assert seen[1] == seen[2]
    assert 90_000 < sum(len(text.encode()) for text in seen[1]) < 200_000
    for file in chosen:
        own = [text for f, text in train if f == file]
        assert (
            own[: (count := sum(text in set(own) for text in seen[1]))]
            == [text for text in seen[1] if text in set(own)][:count]
        )
    prints = {load_tokenizer(out).fingerprint for out in outs}
    assert len(prints) == 1


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {rank.to_bytes(3, "big"): rank for rank in range(256, 66_000)}
    from helpers.tokenizer_files import model_file

    (tmp_path / "tokenizer.model").write_bytes(model_file(ranks))
    tree = make_tree(tmp_path / "tree", 100_000, shards=2, broken=0)
    out = run(tree, tmp_path / "out", str(tmp_path / "tokenizer.model"))
    tokens = Corpus.open(out, "train").tokens
    assert tokens.dtype == np.uint32
    assert tokens[:1].tolist() == [66_000]
    documents(out, "train")


def test_another_tokenizer_in_the_same_place(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 100_000, shards=2, broken=0)
    found = {}
    for size in (300, 320):
        out = run(tree, tmp_path / "out", "bpe", vocab_size=size, overwrite=True)
        assert Corpus.open(out, "train").meta.vocab_size == size
        found[size] = documents(out, "train")
    assert found[300] == found[320] != []
