import shutil
from pathlib import Path

import pytest
from jsonargparse import ArgumentError

from helpers.corpora import in_validation, run
from helpers.make_tree import make_tree
from helpers.raw_text import TEXTS, write_jsonl
from ropepp.commands.corpus import main
from ropepp.data.prepare.inspect import inspect, verify
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError


def test_a_corpus_in_words(tmp_path: Path) -> None:
    out = run(write_jsonl(tmp_path / "mine.jsonl"), tmp_path / "out")
    lines = inspect(out).splitlines()
    assert lines[:3] == [
        f"{out}: mine, from {tmp_path}/mine.jsonl",
        f"tokenizer bytes, vocabulary of 257, 16 bits a token, fingerprint"
        f" {Corpus.open(out, 'train').meta.tokenizer_fingerprint[:12]}",
        "left out: 0 bad lines, 0 empty documents, 0 short documents",
    ]
    meta = Corpus.open(out, "train").meta
    assert f"train: {meta.documents} documents, {meta.tokens:,} tokens, " in lines[4]
    assert lines[5] == "  lengths from 47 to 48 tokens, BOS and end-of-text counted:"
    assert lines[6].split() == ["32", str(meta.documents), "100.0%", "of", "tokens", "#" * 40]
    first = next(text for text in TEXTS if not in_validation(text, 0.2))
    assert lines[8] == f"  {first!r}" + (" ..." if len(first) > 47 else "")
    assert lines[12].startswith("validation: ")


def test_lengths_are_counted_by_powers_of_two(tmp_path: Path) -> None:
    for length in (1, 2, 3, 7, 8, 31, 32):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{length:02d}.txt").write_text("x" * (length - 1) or " ")
    text = inspect(run(tmp_path / "texts", tmp_path / "out", validation_fraction=0))
    rows = [line.split()[:2] for line in text.splitlines() if "of tokens" in line]
    assert rows == [["2", "2"], ["4", "1"], ["8", "1"], ["16", "1"], ["32", "1"]]


def test_verify_finds_damage_in_every_file(tmp_path: Path) -> None:
    out = run(make_tree(tmp_path / "tree", 300_000, shards=3), tmp_path / "out", "bpe")
    text = verify(out)
    meta = Corpus.open(out, "train").meta
    assert text.splitlines()[0] == (
        f"train: {meta.documents:,} documents, {meta.tokens:,} tokens (shards: 3) are as written"
    )
    assert "shards in shards/: 3" in inspect(out)
    checked = list(out.rglob("*.bin"))
    checked += [out / "tokenizer.json", out / "train/shards.json", out / "train/meta.json"]
    assert len(checked) == 3 * 2 * 2 + 2 + 3
    for path in checked:
        content = path.read_bytes()
        for damaged in (content[:-3], content[:-9] + b"8" * 9, b""):
            path.write_bytes(damaged)
            with pytest.raises(InputError) as caught:
                verify(out)
            assert "\n" not in str(caught.value)
        path.unlink()
        with pytest.raises(InputError):
            verify(out)
        path.write_bytes(content)
    assert verify(out) == text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(write_jsonl(tmp_path / "mine.jsonl"), tmp_path / "out")
    capsys.readouterr()
    main(["verify", str(out)])
    main(["inspect", str(out)])
    assert capsys.readouterr().out == verify(out) + inspect(out)
    with pytest.raises(ArgumentError, match="inspect"):
        main(["paint", str(out)])
    for command in ("verify", "inspect"):
        with pytest.raises(InputError, match="is no prepared corpus; `ropepp prepare` makes one"):
            main([command, str(tmp_path)])


def test_verify_misses_a_split_that_is_gone(tmp_path: Path) -> None:
    out = run(write_jsonl(tmp_path / "mine.jsonl"), tmp_path / "out")
    shutil.rmtree(out / "validation")
    with pytest.raises(InputError, match=r"out/validation is missing; .* has tokens of it"):
        verify(out)
