import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard

from helpers.corpora import in_validation
from helpers.raw_text import TEXTS, json_lines, write_folder, write_jsonl, write_zst
from ropepp.data.prepare import encode as shards
from ropepp.data.prepare.prepare import prepare
from ropepp.data.text import documents as texts
from ropepp.data.text import readers
from ropepp.data.tokenizer import load_tokenizer, train_bpe
from ropepp.data.tokens.corpus import Corpus
from ropepp.data.tokens.writer import TokenWriter
from ropepp.errors import InputError


def documents(folder: Path, split: str) -> list[str]:
    corpus = Corpus.open(folder, split)
    corpus.verify()
    tokenizer, ends = corpus.load_tokenizer(), corpus.offsets.tolist()
    parts = [corpus.tokens[a:b].tolist() for a, b in pairwise(ends)]
    start = 0 if tokenizer.bos_id is None else 1
    assert all(part[-1] == tokenizer.eot_id for part in parts)
    assert all(part[0] == tokenizer.bos_id for part in parts if start)
    texts = [tokenizer.decode(part[start:-1]) for part in parts]
    assert corpus.meta.text_bytes == sum(len(text.encode()) for text in texts)
    return texts


@pytest.mark.parametrize(
    ("write", "name", "expected_name"),
    [
        (write_jsonl, "mine.jsonl", "mine"),
        (write_zst, "mine.jsonl.zst", "mine"),
        (write_folder, "texts", "texts"),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 18])
def test_documents_arrive_whole_in_order_and_in_their_split(
    write: Callable[[Path], str],
    name: str,
    expected_name: str,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "BLOCK", block)
    monkeypatch.setattr(texts, "BLOCK", block)
    monkeypatch.setattr(texts, "IN_MEMORY", block)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 100)
    out = prepare(write(tmp_path / name), tokenizer="bytes", validation_fraction=0.25)
    assert out == Path("data") / expected_name
    assert documents(out, "train") == [t for t in TEXTS if not in_validation(t, 0.25)]
    assert documents(out, "validation") == [t for t in TEXTS if in_validation(t, 0.25)]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [expected_name]
    meta = Corpus.open(out, "validation").meta
    assert (meta.name, meta.source) == (expected_name, str(tmp_path / name))


def test_the_trained_tokenizer_sees_the_train_split_alone(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare(source, str(out), vocab_size=300, validation_fraction=0.25)
    trained = train_bpe((text for text in TEXTS if not in_validation(text, 0.25)), 300)
    assert load_tokenizer(out).fingerprint == trained.fingerprint
    assert Corpus.open(out, "train").meta.vocab_size == 300
    assert documents(out, "validation") == [t for t in TEXTS if in_validation(t, 0.25)]
    # And again with that tokenizer, from its folder.
    prepare(source, str(tmp_path / "again"), tokenizer=str(out), validation_fraction=0.25)
    for split in ("train", "validation"):
        metas = [Corpus.open(tmp_path / name, split).meta for name in ("out", "again")]
        assert metas[0].shards_sha256 == metas[1].shards_sha256


def test_added_files_leave_documents_where_they_are(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "texts")
    first = prepare(source, str(tmp_path / "1"), tokenizer="bytes", validation_fraction=0.25)
    for number in range(20):
        (tmp_path / f"texts/b/{number}.txt").write_text(f"Further text {number}")
    second = prepare(source, str(tmp_path / "2"), tokenizer="bytes", validation_fraction=0.25)
    for split in ("train", "validation"):
        assert set(documents(first, split)) < set(documents(second, split))


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("line of words\n" * 100, "line of words\n" * 96),
        ("word " * 100, "word " * 96),
        ("x" * 100, "x" * 95),
        ("é\n", None),
        ("ab", "a"),
    ],
)
def test_one_document_is_cut(
    text: str, train: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.txt"
    file.write_bytes(text.encode())
    out = tmp_path / "out"
    if train is None:
        with pytest.raises(InputError, match="only document has 2 characters, too few"):
            prepare(str(file), str(out), tokenizer="bytes")
        assert not out.exists()
        return
    prepare(str(file), str(out), tokenizer="bytes")
    assert documents(out, "train") == [train]
    assert documents(out, "validation") == [text.removeprefix(train)]
    assert "One document: its last 5% are cut off for validation" in capsys.readouterr().out


def test_without_validation(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a b")
    out = prepare(str(file), str(tmp_path / "out"), tokenizer="bytes", validation_fraction=0)
    assert documents(out, "train") == ["a b"]
    with pytest.raises(InputError, match="validation is no folder"):
        Corpus.open(out, "validation")


def test_the_presidential_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare("sotu", str(tmp_path / "sotu"), tokenizer="bytes")
    train, validation = (Corpus.open(out, split).meta for split in ("train", "validation"))
    assert train.documents + validation.documents == 249
    assert validation.documents == 11
    assert "pandas" not in sys.modules
    printed = capsys.readouterr().out
    assert f"next: ropepp fit --config configs/experiment/quickstart.yaml --data.corpus {out}" in (
        printed
    )
    assert "11,634,963 tokens   1.00 bytes per token" in printed


def test_what_was_left_out_is_reported_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_bytes(b"{\n[]\n" + json_lines(["", *TEXTS]))
    prepare(str(file), str(out), vocab_size=260, validation_fraction=0.25, on_bad_line="skip")
    assert sorted(documents(out, "train") + documents(out, "validation")) == sorted(TEXTS)
    meta = Corpus.open(out, "train").meta
    assert (meta.bad_lines, meta.empty_documents) == (2, 1)
    assert "left out: 1 empty documents, 2 bad lines" in capsys.readouterr().out


def test_another_field(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines(TEXTS, field="content"))
    out = prepare(
        str(file),
        str(tmp_path / "out"),
        tokenizer="bytes",
        field="content",
        validation_fraction=0,
    )
    assert documents(out, "train") == TEXTS


FILES: dict[str, bytes] = {
    "good.jsonl": json_lines(TEXTS),
    "latin.txt": b"caf\xe9",
    "empty.jsonl": b'\n{"text": " "}\n',
    "void.txt": b"",
    "cut.jsonl.zst": zstandard.compress(os.urandom(1000).hex().encode())[:-9],
    "not.jsonl.zst": b"hello, I am text",
    "two.jsonl": json_lines(["a b", "c d"]),
    "same.jsonl": json_lines(["a b", "a b"]),
    "bad.jsonl": json_lines(TEXTS) + b"{}\n",
    "words.csv": b"a,b",
    "none/words.csv": b"a,b",
    "words.json": b"{}",
    "taken/train/meta.json": b"{}",
    "taken/text/a.txt": b"a",
    "home/letter": b"dear",
}
SUFFIXES = ".txt, .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .arrow"
KINDS = f"allowed are sotu, an existing file {SUFFIXES}, a folder of such files, or hub:NAME"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, f"source is 'nothing'; {KINDS}"),
        ("words.csv", {}, f"source is 'words.csv'; {KINDS}"),
        ("none", {}, f"source 'none' holds no file; read are {SUFFIXES}"),
        ("good.jsonl", {"out": "home"}, "home exists; choose another name or pass --overwrite"),
        ("good.jsonl", {"out": "words.csv"}, "words.csv exists; choose another name or pass"),
        (
            "good.jsonl",
            {"out": "words.csv/new"},
            ".new.partial cannot be written: Not a dir",
        ),
        (
            "good.jsonl",
            {"out": "home", "overwrite": True},
            "out is home, which is no prepared corpus and is not overwritten",
        ),
        (
            "taken/text",
            {"out": "taken", "overwrite": True},
            "out is taken, which holds the source taken/text/a.txt; choose another",
        ),
        (
            "empty.jsonl",
            {},
            "source 'empty.jsonl' has no documents (left out: 1 empty documents, 0 bad lines);",
        ),
        ("void.txt", {}, "source 'void.txt' has no documents (left out: 1 empty documents"),
        ("bad.jsonl", {}, "bad.jsonl, line 41: no field 'text'; fields are none; or pass --on_ba"),
        ("latin.txt", {}, "latin.txt: not UTF-8 at byte 3 (found 0xe9)"),
        ("cut.jsonl.zst", {}, "cut.jsonl.zst is cut off inside a zstd frame; allowed are"),
        ("not.jsonl.zst", {}, "not.jsonl.zst is damaged or no zstd file: "),
        ("good.jsonl", {"tokenizer": "gpt9"}, "tokenizer is 'gpt9'; allowed are 'bytes', an"),
        ("good.jsonl", {"tokenizer": "words.json"}, "words.json is no tokenizer.json of"),
        ("good.jsonl", {"validation_fraction": 1.0}, "validation_fraction is 1.0; allowed are 0"),
        ("good.jsonl", {"validation_fraction": -0.1}, "validation_fraction is -0.1; allowed are"),
        ("good.jsonl", {"on_bad_line": "drop"}, "on_bad_line is 'drop'; allowed are ('fail', 's"),
        ("two.jsonl", {}, "validation_fraction is 0.05: none of the 2 documents falls into val"),
        ("two.jsonl", {"validation_fraction": 0.99}, "falls into train; use a smaller one, for"),
        ("same.jsonl", {}, "falls into validation; use 0, as all documents are the same text"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bad_input(
    source: str,
    options: dict[str, Any],
    message: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as caught:
        prepare(source, **{"out": "corpora/new", "tokenizer": tokenizer} | options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(Path().rglob("*")) - {Path("corpora")} == set(before)
    assert all(Path(name).read_bytes() == content for name, content in FILES.items())


def test_a_vocabulary_without_merges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 257; it must be at least 258"):
        prepare(write_jsonl(tmp_path / "a.jsonl"), str(tmp_path / "out"), vocab_size=257)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_advised_fraction_works(tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_bytes(FILES["two.jsonl"])
    for fraction in (0.05, 0.99):
        with pytest.raises(InputError) as caught:
            prepare(str(file), str(tmp_path / "out"), "bytes", validation_fraction=fraction)
        advised = float(str(caught.value).rsplit(" ", 1)[1])
        out = prepare(
            str(file), str(tmp_path / f"{fraction}"), "bytes", validation_fraction=advised
        )
        assert len(documents(out, "train")) == len(documents(out, "validation")) == 1


@pytest.mark.parametrize(
    ("package", "source", "tokenizer", "extra"),
    [
        ("zstandard", "a.jsonl.zst", "bytes", "data"),
        ("tiktoken", "a.jsonl", "tokenizer.model", "data"),
        ("sotu", "sotu", "bytes", "demo"),
    ],
)
def test_missing_packages_are_named(
    package: str,
    source: str,
    tokenizer: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.jsonl.zst", "tokenizer.model"):
        Path(name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        prepare(source, "out", tokenizer=tokenizer)
    assert f"pip install 'ropepp[{extra}]'" in str(caught.value)


def test_overwrite_replaces_a_corpus_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_bytes(json_lines(TEXTS))
    prepare(str(file), str(out), tokenizer="bytes", validation_fraction=0.25)
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "append", _fail)
        with pytest.raises(RuntimeError, match="disk on fire"):
            prepare(str(file), str(out), "bytes", validation_fraction=0, overwrite=True)
    assert set(documents(out, "train") + documents(out, "validation")) == set(TEXTS)
    prepare(str(file), str(out), tokenizer="bytes", validation_fraction=0, overwrite=True)
    assert documents(out, "train") == TEXTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert sorted(path.name for path in out.iterdir()) == ["shards", "train"]


def _fail(*_: object) -> None:
    raise RuntimeError("disk on fire")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_failure_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines(TEXTS))
    monkeypatch.setattr(TokenWriter, "append", _fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare(str(file), str(tmp_path / "out"), kind, 260, 0.25)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


KILLED = """
import sys, time
from ropepp.data.prepare.prepare import prepare
from ropepp.data.tokens.writer import TokenWriter
append = TokenWriter.append
def slow(self, ids, text_bytes):
    append(self, ids, text_bytes)
    if self.documents == 5:
        self._tokens._flush()
        print("ready", flush=True)
        time.sleep(60)
TokenWriter.append = slow
prepare(*sys.argv[1:3], tokenizer="bytes", validation_fraction=0.25)
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_bytes(json_lines(TEXTS))
    command = [sys.executable, "-c", KILLED, str(file), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    prepare(str(file), str(out), tokenizer="bytes", validation_fraction=0.25)
    assert set(documents(out, "train") + documents(out, "validation")) == set(TEXTS)


@pytest.mark.slow
def test_preparing_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, ropepp.data.prepare.prepare; print({'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
