import random
from functools import lru_cache
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from helpers.tokenizer_files import llama_split, model_file, ranks_of, trained
from ropepp.data.prepare.safe_cuts import pieces
from ropepp.data.tokenizer import (
    BpeTokenizer,
    BytesTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    decode_behind,
    encode_behind,
    tail,
)

FRAGMENTS = [
    *("a", "the", " the", " word", "Word", "'s", "'LL", "don't", "x" * 30, "ни", "é", "e\u0301"),
    *(" ", "  ", "   ", " " * 20, "\n", "\n\n", "\r\n", " \n", "\n ", "\n" * 9, "\t", "\x1c"),
    *("\u00a0", "\u3000", "\u2028", "\u0085", "\u200d", "\u0600", "\u0964", "\u3002", "\uff0c"),
    *("!", "?!", "...", ",", ".", "_", "-", "(", '"', "1", "234", "12345", "\u00bd", "\u00b2"),
    *("\u4f60\u597d", "\u4e16\u754c", "\U0001f600", "\u0130", "\u00df", "\u03a3", "\ufb01"),
    *("<|endoftext|>", "<|begin_of_text|>"),
]
some_text = st.lists(st.sampled_from(FRAGMENTS), max_size=300).map("".join)
no_special = some_text.filter(lambda text: "<|" not in text)
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
    replace = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence([replace, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
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
    """As a long document is encoded: what follows the first part goes on."""
    encoded = tokenizer.encode_batch(parts[:1]) + encode_behind(tokenizer, parts[1:])
    return [i for own in encoded for i in own]


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


def test_a_tokenizer_that_marks_beginnings_cuts_as_others_do() -> None:
    tokenizer, text = tokenizer_of("llama 2"), "the word " * 100
    parts = list(pieces([text], tokenizer, size=50, limit=200))
    assert len(parts) > 15
    assert ids(tokenizer, parts) == ids(tokenizer, [text])


@pytest.mark.parametrize("kind", [*PROVEN, "prefix space", "metaspace", "llama 2"])
@settings(max_examples=60, deadline=None)
@given(before=no_special.filter(bool), text=no_special)
def test_what_goes_on_after_a_text_is_as_in_the_whole(kind: str, before: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    (whole,), (begun,) = tokenizer.encode_batch([before + text]), tokenizer.encode_batch([before])
    (behind,) = encode_behind(tokenizer, [text], before)
    expected = tokenizer.decode(whole)
    assert tokenizer.decode(begun + behind) == expected
    if kind not in PROVEN and whole[: len(begun)] == begun:
        assert begun + behind == whole
    # The text of the ids behind: all of them, and with as few before as do.
    for part in (begun, tail(tokenizer, begun, 2)):
        assert tokenizer.decode(begun) + decode_behind(tokenizer, part, behind) == expected
