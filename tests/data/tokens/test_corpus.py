import hashlib
import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from helpers.corpora import change_record, write_corpus
from ropepp.data.text.readers import Skipped
from ropepp.data.tokenizer import BytesTokenizer, train_bpe
from ropepp.data.tokens import corpus as corpus_module
from ropepp.data.tokens.corpus import Corpus
from ropepp.data.tokens.writer import BlockChecksums
from ropepp.errors import InputError


class Wide(BytesTokenizer):
    """A tokenizer with BOS whose ids need four bytes."""

    vocab_size = 65537
    bos_id = 65536


TOKENS = "shards/toy/train/tokens.bin"
DOCUMENTS = [[1, 2, 3], [], [7], [200, 0, 255, 4]]


def write(folder: Path, tokenizer: BytesTokenizer | None = None) -> Path:
    skipped = Skipped(bad_lines=2, empty_documents=1)
    return write_corpus(folder, DOCUMENTS, tokenizer, source="by hand", skipped=skipped)


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), Wide()])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_what_is_written_is_read(
    tokenizer: BytesTokenizer, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "CHUNK", chunk)
    corpus = Corpus.open(write(tmp_path, tokenizer), "train")
    corpus.verify()
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    expected = [[*start, *document, 256] for document in DOCUMENTS]
    ends = corpus.offsets.tolist()
    found = [corpus.tokens[a:b].tolist() for a, b in pairwise(ends)]
    assert found == expected
    assert corpus.tokens.dtype == (np.uint32 if start else np.uint16)
    assert not corpus.tokens[0:3].flags.writeable
    meta = corpus.meta
    assert (meta.name, meta.split, meta.source) == ("toy", "train", "by hand")
    assert (meta.documents, meta.tokens) == (4, sum(map(len, expected)))
    assert (meta.text_bytes, meta.bad_lines, meta.empty_documents) == (8, 2, 1)
    assert (meta.tokenizer, meta.eot_id) == ("bytes", 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "train"]


def test_a_pickled_corpus_is_its_place_and_not_its_content(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path), "train")
    content = pickle.dumps(corpus)
    assert b"tokens.bin" not in content
    assert len(content) < 1000
    again = pickle.loads(content)
    assert (again.tokens[:] == corpus.tokens[:]).all()
    assert again.meta == corpus.meta


def truncate(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def change_meta(folder: Path, **values: object) -> None:
    """With a checksum that fits: as a program writes it, not a disk."""
    change_record(folder / "train/meta.json", **values)


def change_offsets(folder: Path, values: list[int]) -> None:
    content = np.array(values, dtype="<i8")
    content.tofile(folder / "train/offsets.bin")
    change_meta(folder, offsets_checksum=BlockChecksums(content).digest())


def change_shard(folder: Path, **values: object) -> None:
    (entry,) = json.loads((folder / "train/shards.json").read_text())
    content = json.dumps([entry | values]).encode()
    (folder / "train/shards.json").write_bytes(content)
    change_meta(folder, shards_sha256=hashlib.sha256(content).hexdigest())


def flip(file: Path, at: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / TOKENS).unlink(), "shards/toy/train/tokens.bin is missing"),
        (lambda c: (c / "train/shards.json").unlink(), "train/shards.json is missing"),
        (lambda c: (c / "train/shards.json").write_text("{}"), "train/shards.json is damaged"),
        (lambda c: truncate(c / "train/shards.json", 3), "train/shards.json is damaged"),
        (lambda c: flip(c / "train/shards.json"), "train/shards.json is damaged"),
        (lambda c: (c / "train/offsets.bin").unlink(), "train/offsets.bin is missing"),
        (lambda c: flip(c / "train/offsets.bin"), "train/offsets.bin is damaged"),
        (lambda c: (c / "train/tokens.crc32").unlink(), "train/tokens.crc32 is missing"),
        (lambda c: flip(c / "train/tokens.crc32", 1), "train/tokens.crc32 is damaged"),
        (lambda c: (c / "train/meta.json").unlink(), "train/meta.json is missing"),
        (lambda c: flip(c / "train/meta.json"), "train/meta.json is damaged"),
        (lambda c: (c / "train").rename(c / "other"), "train is no folder; `ropepp prepare`"),
        (lambda c: truncate(c / TOKENS, 1), "has 23 bytes; meta.json says 24"),
        (lambda c: truncate(c / "train/offsets.bin", 8), "has 32 bytes; meta.json says 40"),
        (lambda c: truncate(c / "train/meta.json", 9), "train/meta.json is no JSON"),
        (lambda c: change_meta(c, format_version=9), "format_version is 9; 4 can be read"),
        (lambda c: change_meta(c, tokens="12"), "tokens is '12'; it must be int"),
        (lambda c: change_meta(c, tokens=True), "tokens is True; it must be int"),
        (lambda c: change_meta(c, tokens=float("nan")), "tokens is nan; it must be int"),
        (lambda c: change_meta(c, tokens=-12), "tokens is -12; it must be int"),
        (lambda c: change_meta(c, tokens=10**400), "tokens is 1000"),
        (lambda c: change_meta(c, bos_id="a"), "bos_id is 'a'; it must be int | None"),
        (lambda c: change_meta(c, bos_id=257), "bos_id 257, eot_id 256; allowed are 'train' and"),
        (lambda c: change_meta(c, split="../x"), "split is '../x', bos_id None, eot_id 256; allo"),
        (lambda c: change_meta(c, colour=1), "missing or unknown are ['colour']"),
        (lambda c: change_meta(c, vocab_size=1 << 33), "vocab_size 8589934592; allowed are up to"),
        (lambda c: change_meta(c, documents=0), "documents is 0; at least 1 is needed"),
        (lambda c: change_meta(c, documents=1 << 60), f"meta.json says {8 * ((1 << 60) + 1)}"),
        (lambda c: change_meta(c, shards=2), "has 1 shards, 4 documents and 12 tokens; meta.json"),
        (lambda c: change_meta(c, files_sha256={"../a": ""}), "files_sha256 names '../a'; allowed"),
        (lambda c: change_meta(c, files_sha256={"a": ""}), "/a is missing; a prepared corpus has"),
        (lambda c: change_shard(c, name="../toy"), "'../toy'"),
        (lambda c: change_shard(c, name="/etc"), "'/etc'"),
        (lambda c: change_shard(c, name=".."), "'..'"),
        (lambda c: change_shard(c, name="a\0b"), "which `ropepp prepare` makes not"),
        (lambda c: change_shard(c, tokens=0), "which `ropepp prepare` makes not"),
        (lambda c: change_shard(c, documents=-4), "documents is -4; it must be int"),
        (lambda c: change_shard(c, tokens=[1]), "shards.json: tokens is [1]; it must be int"),
        (lambda c: change_offsets(c, [0, 4, 5, 7, 13]), "runs from 0 to 13; expected 0 to 12"),
        (lambda c: change_offsets(c, [1, 4, 5, 7, 12]), "runs from 1 to 12; expected 0 to 12"),
        (lambda c: change_offsets(c, [0, 4, 8, 7, 12]), "has 8 then 7 at document 2"),
        (lambda c: change_offsets(c, [0, 4, 4, 7, 12]), "has 4 then 4 at document 1"),
    ],
)
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_open_refuses_damage(
    damage: Callable[[Path], object],
    message: str,
    chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path)
    damage(tmp_path)
    monkeypatch.setattr(corpus_module, "CHUNK", chunk)
    with pytest.raises(InputError) as caught:
        Corpus.open(tmp_path, "train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "tokens.crc32"])
def test_verify_finds_what_open_does_not(name: str, tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path), "train")
    flip(tmp_path / "shards/toy/train" / name, 2)
    again = Corpus.open(tmp_path, "train")
    for opened in (corpus, again):
        with pytest.raises(InputError, match=f"toy/train/{name} is damaged"):
            opened.verify()


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    class Larger(BytesTokenizer):
        vocab_size = 300

    write_corpus(tmp_path, [[1, 2], [3, 299, 4]], Larger())
    change_meta(tmp_path, vocab_size=257)
    corpus = Corpus.open(tmp_path, "train")
    message = r"toy/train/tokens.bin has the id 299 at token 4; ids must be below vocab_size 257"
    for read in (corpus.verify, lambda: corpus.tokens[0:1]):
        with pytest.raises(InputError, match=message):
            read()


def test_the_tokenizer_of_a_corpus_is_checked(tmp_path: Path) -> None:
    assert Corpus.open(write(tmp_path / "a"), "train").load_tokenizer().kind == "bytes"
    bpe = train_bpe(["some text"], 260)
    write_corpus(tmp_path / "b", [[1]], bpe)
    corpus = Corpus.open(tmp_path / "b", "train")
    with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor"):
        corpus.load_tokenizer()
    bpe.save(tmp_path / "b")
    assert corpus.load_tokenizer().fingerprint == bpe.fingerprint
    train_bpe(["other words"], 260).save(tmp_path / "b")
    with pytest.raises(InputError, match=r"tokenizer with fingerprint \w{64}; meta.json says"):
        corpus.load_tokenizer()
