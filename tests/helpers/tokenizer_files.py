"""Tokenizer files made on the spot: no vocabulary can be downloaded."""

import base64
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ropepp.data.tokenizer import LLAMA3_PATTERN


def byte_characters() -> dict[int, str]:
    """The character that byte-level tokenizers write for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + number) for number, byte in enumerate(hidden)
    }


def llama_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def model_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a `tokenizer.model` of Llama 3's format."""
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in ranks.items())


def trained(
    texts: Iterable[str], vocab_size: int, split: pre_tokenizers.PreTokenizer | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE without special tokens, with Llama 3's split unless another is given."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = llama_split() if split is None else split
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def ranks_of(backend: tokenizers.Tokenizer) -> dict[bytes, int]:
    """Bytes to rank of a byte-level BPE."""
    byte_of = {character: byte for byte, character in byte_characters().items()}
    return {
        bytes(byte_of[character] for character in token): rank
        for token, rank in backend.get_vocab().items()
    }


def write_tokenizers(folder: Path, texts: Iterable[str], vocab_size: int) -> tuple[Path, Path]:
    """A tokenizer.model and a tokenizer.json that give the same ids to every text."""
    backend = trained(texts, vocab_size)
    model, whole = folder / "tokenizer.model", folder / "tokenizer.json"
    model.write_bytes(model_file(ranks_of(backend)))
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    backend.save(str(whole))
    return model, whole
