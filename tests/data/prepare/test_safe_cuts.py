import random
from functools import lru_cache
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from helpers.tokenizer_files import llama_split, model_file, ranks_of, trained
from ropepp.data.prepare.safe_cuts import pieces
from ropepp.data.tokenizer import BpeTokenizer, BytesTokenizer, TiktokenTokenizer, Tokenizer

FRAGMENTS = [
    *("a", "the", " the", " word", "Word", "'s", "'LL", "don't", "x" * 30, "ни", "é", "e\u0301"),
    *(" ", "  ", "   ", " " * 20, "\n", "\n\n", "\r\n", " \n", "\n ", "\n" * 9, "\t", "\x1c"),
    *("\u00a0", "\u3000", "\u2028", "\u0085", "\u200d", "\u0600", "\u0964", "\u3002", "\uff0c"),
    *("!", "?!", "...", ",", ".", "_", "-", "(", '"', "1", "234", "12345", "\u00bd", "\u00b2"),
    *("\u4f60\u597d", "\u4e16\u754c", "\U0001f600", "\u0130", "\u00df", "\u03a3", "\ufb01"),
    *("<|endoftext|>", "<|begin_of_text|>"),
]
some_text = st.lists(st.sampled_from(FRAGMENTS), max_size=300).map("".join)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def training_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(FRAGMENTS, k=80)) for _ in range(400)]


def finished(backend: tokenizers.Tokenizer) -> BpeTokenizer:
    backend.add_special_tokens(["<|endoftext|>"])
    return BpeTokenizer(backend.to_str(), "made")


def byte_level(
    split: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> BpeTokenizer:
    backend = trained(training_texts(), 700, split)
    if normalizer is not None:
        backend.normalizer = normalizer
    return finished(backend)


def sentence_pieces(split: pre_tokenizers.PreTokenizer | None) -> BpeTokenizer:
    """Words begin with a mark instead of a space; without a split the whole text is merged."""
    backend = tokenizers.Tokenizer(models.BPE())
    if split is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        backend.pre_tokenizer = split
    backend.train_from_iterator(
        training_texts(), trainers.BpeTrainer(vocab_size=500, show_progress=False)
    )
    return finished(backend)


KINDS = {
    "bytes": BytesTokenizer,
    "bpe": lambda: byte_level(GPT2),
    "tiktoken": lambda: TiktokenTokenizer(
        model_file(ranks_of(trained(training_texts(), 700))), "made"
    ),
    "llama 3": lambda: byte_level(llama_split()),
    "prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normalized": lambda: byte_level(
        llama_split(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "metaspace": lambda: sentence_pieces(pre_tokenizers.Metaspace()),
    "llama 2": lambda: sentence_pieces(None),
}
PROVEN = ("bytes", "bpe", "tiktoken", "llama 3")


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


def ids(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    return [i for encoded in tokenizer.encode_batch(parts) for i in encoded]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=some_text, size=st.integers(2, 200), around=st.sampled_from([8, 16, 64, 256]))
def test_pieces_have_the_ids_of_the_whole(kind: str, text: str, size: int, around: int) -> None:
    tokenizer = tokenizer_of(kind)
    # What is looked at decides where the split has not been thought through.
    around = around if kind in PROVEN else 256
    parts = list(pieces([text], tokenizer, size, 10**9, around))
    assert "".join(parts) == text
    assert all(parts)
    assert ids(tokenizer, parts) == ids(tokenizer, [text])


@pytest.mark.parametrize("kind", PROVEN)
def test_ordinary_text_is_cut_to_size(kind: str) -> None:
    text = "It's here, isn't it?\n\nYes: the end of a line.\nAnd (of course) 1,234 more " * 50
    parts = list(pieces([text], tokenizer_of(kind), size=100))
    assert max(map(len, parts)) <= 100
    assert len(parts) < 1.5 * len(text) / 100
    assert ids(tokenizer_of(kind), parts) == ids(tokenizer_of(kind), [text])


@settings(deadline=None)
@given(text=some_text, cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_how_the_text_arrives_does_not_matter(text: str, cuts: list[int]) -> None:
    ends = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    blocks = [text[a:b] for a, b in pairwise(ends)]
    tokenizer = tokenizer_of("tiktoken")
    expected = list(pieces([text], tokenizer, 30, 90, 16))
    assert list(pieces(blocks, tokenizer, 30, 90, 16)) == expected


@pytest.mark.parametrize("kind", PROVEN)
@pytest.mark.parametrize("letters", ["a", "\u4f60", "\U0001f600", " ", "7"])
def test_without_a_safe_place_the_text_is_cut_at_the_limit(kind: str, letters: str) -> None:
    tokenizer, text = tokenizer_of(kind), letters * 1000 + "end"
    parts = list(pieces([text], tokenizer, size=40, limit=160))
    assert [len(part) for part in parts] == [160] * 6 + [43]
    assert "".join(tokenizer.decode(ids(tokenizer, [part])) for part in parts) == text


def test_a_tokenizer_without_safe_places_is_cut_at_the_limit() -> None:
    """Its normalizer puts a mark in front of every piece: what a cut of such a text costs."""
    tokenizer, text = tokenizer_of("llama 2"), "the word " * 100
    parts = list(pieces([text], tokenizer, size=50, limit=200))
    assert [len(part) for part in parts] == [200] * 4 + [100]
    assert len(ids(tokenizer, parts)) - len(ids(tokenizer, [text])) <= 5 * (len(parts) - 1)
