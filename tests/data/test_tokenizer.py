import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from helpers.tokenizer_files import byte_characters, llama_split, model_file, ranks_of, trained
from ropepp.data.tokenizer import (
    BpeTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from ropepp.errors import InputError

TEXTS = [
    f"The {n}th message: we're (at last) there!\n\n  It's {n * 37} dollars." for n in range(60)
]
# Unicode scalar values: half a surrogate pair is no text.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@lru_cache
def tiny_ranks() -> dict[bytes, int]:
    return ranks_of(trained(TEXTS, 400))


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return load_tokenizer("bytes")
    if kind == "bpe":
        return train_bpe(TEXTS, 400)
    return TiktokenTokenizer(model_file(tiny_ranks()), "tiny")


@lru_cache
def equivalent_of_tiktoken() -> tokenizers.Tokenizer:
    """The same ranks as merges: every way to build a token, in the order of the tokens."""
    ranks, shown = tiny_ranks(), byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = llama_split()
    return backend


@pytest.mark.parametrize("kind", ["bytes", "bpe", "tiktoken"])
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(any_text, max_size=4))
@example(
    texts=["", " ", "\r\n\r\n  x", "a\0b", "<|endoftext|><|begin_of_text|><|end_of_text|></s>"]
)
def test_every_text_comes_back_and_no_text_makes_a_special_token(
    kind: str, texts: list[str]
) -> None:
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    used = {i for ids in encoded for i in ids}
    assert not used & {tokenizer.bos_id, tokenizer.eot_id}
    assert max(used, default=0) < tokenizer.vocab_size


@settings(max_examples=100, deadline=None)
@given(text=any_text | st.text("aeht' \n1.", max_size=60))
def test_tiktoken_gives_the_ids_of_tokenizers(text: str) -> None:
    (ids,) = tokenizer_of("tiktoken").encode_batch([text])
    assert ids == equivalent_of_tiktoken().encode(text).ids


def test_special_ids() -> None:
    facts = {
        kind: (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eot_id)
        for kind in ("bytes", "bpe", "tiktoken")
        if (tokenizer := tokenizer_of(kind))
    }
    assert facts == {"bytes": (257, None, 256), "bpe": (400, None, 0), "tiktoken": (402, 400, 401)}


def test_the_size_of_llama_3_has_its_special_tokens() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {rank.to_bytes(3, "big"): rank for rank in range(256, 128_000)}
    tokenizer = TiktokenTokenizer(model_file(ranks), "large")
    facts = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eot_id
    assert facts == (128_256, 128_000, 128_001)
    assert tokenizer.decode([128_000, 65, 128_001, 128_255]) == "A"


def test_tiktoken_survives_long_runs_of_white_space() -> None:
    text = "a" + " " * 1_000_001 + "b\n"
    tokenizer = tokenizer_of("tiktoken")
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_decode_leaves_special_tokens_out() -> None:
    for kind in ("bytes", "bpe", "tiktoken"):
        tokenizer = tokenizer_of(kind)
        (ids,) = tokenizer.encode_batch(["text"])
        special = [i for i in (tokenizer.bos_id, tokenizer.eot_id) if i is not None]
        assert tokenizer.decode([*special, *ids, *special]) == "text"


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path)
    (file,) = tmp_path.iterdir()
    for place in (tmp_path, file):
        again = load_tokenizer(place)
        assert again.kind == kind
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_training_is_deterministic_and_the_fingerprint_follows_the_content() -> None:
    assert train_bpe(TEXTS, 400).fingerprint == tokenizer_of("bpe").fingerprint
    assert train_bpe(TEXTS, 399).fingerprint != tokenizer_of("bpe").fingerprint
    fingerprints = {tokenizer_of(kind).fingerprint for kind in ("bytes", "bpe", "tiktoken")}
    assert len(fingerprints) == 3


def test_the_fingerprint_ignores_the_layout_of_the_file(tmp_path: Path) -> None:
    bpe = tokenizer_of("bpe")
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    other = json.dumps(dict(reversed(content.items())), indent=7)
    assert BpeTokenizer(other, "other").fingerprint == bpe.fingerprint
    shuffled = dict(reversed(tiny_ranks().items()))
    other_ranks = TiktokenTokenizer(model_file(shuffled), "other")
    assert other_ranks.fingerprint == tokenizer_of("tiktoken").fingerprint


def bpe_json(*names: str, special: bool = True) -> str:
    backend = tokenizers.Tokenizer.from_str(train_json())
    for name in names:
        backend.add_tokens([tokenizers.AddedToken(name, special=special)])
    return backend.to_str()


@lru_cache
def train_json() -> str:
    """A tokenizer without any special token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(initial_alphabet=alphabet))
    return backend.to_str()


@pytest.mark.parametrize("bos", ["<|begin_of_text|>", "<s>", "<bos>", "[BOS]", None])
@pytest.mark.parametrize("eot", ["<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]"])
def test_usual_names_of_special_tokens_are_found(bos: str | None, eot: str) -> None:
    tokenizer = BpeTokenizer(bpe_json(*filter(None, (bos, eot))), "file")
    special = tokenizer.vocab_size - 1
    assert tokenizer.eot_id == special
    assert tokenizer.bos_id == (special - 1 if bos else None)


def test_end_of_text_that_the_file_does_not_mark_as_special_is_no_way_in() -> None:
    tokenizer = BpeTokenizer(bpe_json("</s>", special=False), "file")
    assert tokenizer.eot_id not in tokenizer.encode_batch(["a</s>b"])[0]


WORDS = {"<s>": "an ordinary word", "[START]": "begins", "[STOP]": "ends"}


@pytest.mark.parametrize(
    ("files", "options", "ids"),
    [
        ({}, {}, None),
        ({}, {"bos": "[START]", "eot": "[STOP]"}, (1, 2)),
        ({}, {"eot": "[STOP]"}, (None, 2)),
        ({"tokenizer_config": {"bos_token": "[START]", "eos_token": "[STOP]"}}, {}, (1, 2)),
        ({"special_tokens_map": {"eos_token": {"content": "[STOP]"}}}, {}, (None, 2)),
        ({"tokenizer_config": {"eos_token": "[STOP]", "bos_token": None},
          "special_tokens_map": {"bos_token": "[START]"}}, {}, (None, 2)),
        ({"tokenizer_config": {"eos_token": "[STOP]", "bos_token": "[STOP]"}}, {}, (None, 2)),
        ({"tokenizer_config": {"bos_token": "[START]", "eos_token": "[STOP]"}},
         {"bos": ""}, (None, 2)),
        ({"template": "[START] $A [STOP]"}, {}, (1, 2)),
        ({"template": "$A [STOP]"}, {"bos": "<s>"}, (0, 2)),
    ],
)  # fmt: skip
def test_begin_and_end_are_told_by_the_files_or_the_user(
    files: dict[str, Any],
    options: dict[str, str],
    ids: tuple[int | None, int] | None,
    tmp_path: Path,
) -> None:
    """An ordinary `<s>` of the vocabulary, which texts may hold, begins no document."""
    backend = tokenizers.Tokenizer.from_str(train_json())
    content = json.loads(backend.to_str())
    vocab = {name: number for number, name in enumerate(WORDS)}
    content["model"]["vocab"] = vocab | {
        token: number + len(vocab) for token, number in content["model"]["vocab"].items()
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    if template := files.pop("template", None):
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, vocab[name]) for name in list(WORDS)[1:]]
        )
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    if ids is None:
        with pytest.raises(InputError, match=r"has no end-of-text token; .* --eot, or as eos"):
            load_tokenizer(tmp_path, **options)
        return
    found = load_tokenizer(tmp_path, **options)
    assert (found.bos_id, found.eot_id) == ids
    saved = tmp_path / "saved"
    saved.mkdir()
    found.save(saved)
    again = load_tokenizer(saved)
    assert (again.bos_id, again.eot_id, again.fingerprint) == (*ids, found.fingerprint)
    other = load_tokenizer(tmp_path, bos="[STOP]", eot="[START]")
    assert other.fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer_config.json is no JSON"),
        (b"[]", "tokenizer_config.json is list; allowed is a JSON object"),
        (b'{"bos_token": 7}', "bos_token is 7; allowed is a token or null"),
        (b'{"eos_token": "<gone>"}', "has no token '<gone>', which is named as end-of-text"),
    ],
)
def test_bad_words_of_a_tokenizer_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe_json("</s>"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)
    with pytest.raises(InputError, match="eot 'x'; allowed are tokens of a"):
        load_tokenizer("bytes", eot="x")


RANKS = model_file({bytes([byte]): byte for byte in range(256)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer.json of `tokenizers`"),
        ("tokenizer.json", b"\xff", "tokenizer.json is not UTF-8 at byte 0"),
        ("tokenizer.json", None, "no end-of-text token; known are <|end_of_text|>, <|endoftext|>"),
        ("tokenizer.model", b"YQ== 0\nYg==\n", "tokenizer.model, line 2: b'Yg==' is not of the"),
        ("tokenizer.model", b"\x0a\x0e\x00binary", "is not of the form 'base64 rank'"),
        ("tokenizer.model", b"!!!! 0\n", "line 1: b'!!!! 0' is not of the form"),
        ("tokenizer.model", RANKS + b"YWI= 300\n", "has 257 tokens whose ranks are not 0, 1, ..."),
        ("tokenizer.model", b"YQ== 0\n", "has no rank for byte 0; all 256 are needed"),
        ("words.txt", b"", "allowed are files .json, .model and .tiktoken"),
        ("folder/words.txt", b"", "folder holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(train_json().encode() if content is None else content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(file.parent if "/" in name else file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_tokenizer_and_too_small_vocabulary() -> None:
    with pytest.raises(InputError, match="tokenizer is 'gpt9'; allowed are 'bytes', an existing"):
        load_tokenizer("gpt9")
    with pytest.raises(InputError, match="vocab_size is 257; it must be at least 258"):
        train_bpe(TEXTS, 257)
    assert train_bpe(TEXTS, 258).vocab_size == 258


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        (
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 9999},
            "1e+04 times long",
        ),
        (
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaa"}]
                * 12,
            },
            "2.44e+08 times longer; allowed are 1000",
        ),
        ({"type": "Replace", "pattern": {"String": ""}, "content": "a"}, "no tokenizer.json of"),
        (5, "no tokenizer.json of `tokenizers`"),
    ],
)
def test_hostile_normalizers_are_refused_at_once(
    normalizer: object, words: str, tmp_path: Path
) -> None:
    train_bpe(["some text"], 260).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(InputError) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{" * 300_000)
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json of"):
        load_tokenizer(tmp_path)
    (tmp_path / "large.json").write_bytes(b"")
    os.truncate(tmp_path / "large.json", 1 << 40)
    with pytest.raises(InputError, match=r"large\.json has more than \d+ bytes"):
        load_tokenizer(tmp_path / "large.json")
