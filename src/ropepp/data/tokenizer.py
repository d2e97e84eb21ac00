"""Text to token ids and back, behind one interface.

Three kinds: `bpe` (a `tokenizer.json`), `tiktoken` (a `tokenizer.model` whose lines are "base64
rank", the layout of Llama 3) and `bytes` (no file). No kind adds special tokens by itself, and the
text of a special token inside a document is encoded as ordinary text, so that a document cannot
end itself.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol

from ropepp.data.special_tokens import (
    CONFIG_FILE,
    EOT_NAMES,
    find,
    library_errors,
    named_beside,
    require_short,
    usual_ids,
)
from ropepp.errors import InputError, at_least, optional
from ropepp.files import write_synced
from ropepp.records import read_bytes

BPE_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tokenizer.model"
SMALLEST_BPE = 258  # 256 bytes, end-of-text, a merge

LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL_TOKENS = 256
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    kind: str  # "bpe", "tiktoken" or "bytes"
    vocab_size: int  # one more than the largest id, special tokens included
    bos_id: int | None  # begins every document
    eot_id: int  # ends every document
    fingerprint: str  # sha256 of what decides the ids: not of the path or the file's layout

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens leave none, bytes that are no UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Writes the file that `load_tokenizer` reads into a folder (`bytes` needs none)."""


class BytesTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is end-of-text; there is no BOS."""

    kind = "bytes"
    vocab_size = 257
    bos_id: int | None = None
    eot_id = 256
    fingerprint = hashlib.sha256(b"bytes: 0..255 bytes, 256 end-of-text").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        pass


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library; `content` is the text of a `tokenizer.json`, which
    messages call `origin`.

    Documents begin with the token `bos`, "" for none, and end with `eot`. Unless given, these are
    what the tokenizer itself puts around a text, or else its special tokens with usual names.
    Raises an `InputError` if the content is no tokenizer, lacks a given token, or none of its
    tokens is known as end-of-text."""

    kind = "bpe"

    def __init__(
        self, content: str, origin: str, bos: str | None = None, eot: str | None = None
    ) -> None:
        from tokenizers import Tokenizer as Backend

        self._content, self._origin = content, origin
        with library_errors(f"{origin} is no tokenizer.json of `tokenizers`"):
            self._backend = Backend.from_str(content)
            values = json.loads(content)
            require_short(values.get("normalizer"), origin)
            found = find(self._backend, values)
        self._named = bos is not None or eot is not None  # which the content alone does not tell
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        bos, eot = found[0] if bos is None else bos, found[1] if eot is None else eot
        self._config = {"bos_token": bos or None, "eos_token": eot}
        if eot is None:
            raise InputError(
                f"{origin} has no end-of-text token; known are {', '.join(EOT_NAMES)} among special"
                f" tokens: name another with --eot, or as eos_token in a {CONFIG_FILE} beside it"
            )
        self.eot_id = self._id_of(eot, "end-of-text")
        # One token between documents ends them; it does not begin them too.
        self.bos_id = self._id_of(bos, "BOS") if bos and bos != eot else None
        # A file may not mark them as special: they would be found in text, and shown by decode.
        self._backend.add_special_tokens([token for token in (bos, eot) if token])
        self.fingerprint = self._fingerprint(values)

    def _id_of(self, token: str, role: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            named = f"{self._origin} has no token {token!r}, which is named as {role}"
            raise InputError(f"{named}; allowed are its own")
        return int(found)

    def _fingerprint(self, content: dict[str, Any]) -> str:
        """Of the parts that decide ids: not truncation, padding, decoder or the file's layout; BOS
        and end-of-text where the vocabulary does not tell them."""
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        facts = {part: content.get(part) for part in parts}
        if [self.bos_id, self.eot_id] != usual_ids(self._backend):
            facts |= {"bos": self.bos_id, "eot": self.eot_id}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with library_errors(f"{self._origin} cannot encode a text"):
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [item.ids for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        write_synced(folder / BPE_FILE, self._content.encode())
        if self._named:
            write_synced(folder / CONFIG_FILE, (json.dumps(self._config) + "\n").encode())


class TiktokenTokenizer:
    """Ranks of byte strings, lines "base64 rank", with the split and the special ids of Llama 3.

    After the ranks come BOS and end-of-text; a file of 128000 ranks counts 256 special ids, as
    Llama 3 does. Raises an `InputError` if the content has another form, a rank or a single byte is
    missing, or `tiktoken` is not installed."""

    kind = "tiktoken"
    # tiktoken's regular expression overflows its stack in longer runs of white space.
    _LONG = 20_000
    _LONG_SPACE = re.compile(rf"\s{{{_LONG}}}")

    def __init__(self, content: bytes, origin: str) -> None:
        tiktoken = optional("tiktoken", "data", origin)
        ranks = parse_ranks(content, origin)
        self._content = content
        self._ordinary = len(ranks)
        with library_errors(f"{origin} is no tokenizer of `tiktoken`"):
            self._backend = tiktoken.Encoding(
                "ropepp", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
            )
        special = LLAMA3_SPECIAL_TOKENS if len(ranks) == LLAMA3_RANKS else 2
        self.vocab_size = len(ranks) + special
        self.bos_id: int | None = len(ranks)
        self.eot_id = len(ranks) + 1
        listing = "\n".join(f"{token.hex()} {rank}" for token, rank in ranks.items())
        facts = f"{LLAMA3_PATTERN}\n{special}\n{listing}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if (threads := num_threads()) == 1:
            encoded: Iterator[list[int]] = map(self._backend.encode_ordinary, flat)
        else:
            encoded = iter(self._backend.encode_ordinary_batch(flat, num_threads=threads))
        # Most texts are one piece: their ids are not copied.
        return [
            next(encoded) if len(parts) == 1 else [i for _ in parts for i in next(encoded)]
            for parts in pieces
        ]

    def _pieces(self, text: str) -> list[str]:
        if len(text) < self._LONG:
            return [text]
        cuts = [0, *(match.end() for match in self._LONG_SPACE.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([i for i in ids if i < self._ordinary])

    def save(self, folder: Path) -> None:
        write_synced(folder / TIKTOKEN_FILE, self._content)


def num_threads() -> int:
    """Threads that encode a batch: a process among several leaves the others the rest."""
    return 1 if parent_process() is not None else os.cpu_count() or 1


def load_tokenizer(
    path_or_kind: str | Path, bos: str | None = None, eot: str | None = None
) -> Tokenizer:
    """The tokenizer of the word "bytes", of a `.json` file of `tokenizers`, of a `.model` or
    `.tiktoken` file of "base64 rank" lines, or of a folder (such as a prepared corpus) that holds
    `tokenizer.json` or `tokenizer.model`.

    `bos` and `eot` are for `BpeTokenizer`; unless given, what the files beside a `tokenizer.json`
    say. Raises an `InputError` if there is no such thing, or it is no tokenizer."""
    path = Path(path_or_kind)
    if (bos, eot) != (None, None) and (path.suffix in (".model", ".tiktoken") or not path.exists()):
        raise InputError(f"bos is {bos!r}, eot {eot!r}; allowed are tokens of a {BPE_FILE} alone")
    if str(path) == "bytes":
        return BytesTokenizer()
    if path.is_dir():
        inside = [path / name for name in (BPE_FILE, TIKTOKEN_FILE) if (path / name).is_file()]
        if not inside:
            raise InputError(f"{path} holds neither {BPE_FILE} nor {TIKTOKEN_FILE}")
        path = inside[0]
    if not path.is_file():
        raise InputError(
            f"tokenizer is {str(path)!r}; allowed are 'bytes', an existing file or folder"
        )
    content = read_bytes(path)
    if path.suffix == ".json":
        told = named_beside(path) if path.name == BPE_FILE else {}
        bos = told.get("bos_token") if bos is None else bos
        eot = told.get("eos_token") if eot is None else eot
        try:
            return BpeTokenizer(content.decode(), str(path), bos, eot)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 at byte {error.start}") from error
    if path.suffix in (".model", ".tiktoken"):
        return TiktokenTokenizer(content, str(path))
    raise InputError(f"tokenizer is {str(path)!r}; allowed are files .json, .model and .tiktoken")


def encode_behind(tokenizer: Tokenizer, texts: list[str], before: str = "") -> list[list[int]]:
    """The ids of texts that go on after another one, "" if that is unknown.

    Some tokenizers mark the beginning of all that they encode (Llama 2's puts a space there), which
    must not stand inside a text. So the text before is encoded too and its ids are taken away; or
    those of a stand-in, where it is unknown or shares a token with what follows."""
    plain = tokenizer.encode_batch(texts)
    heads = ["\n", ".", "a"]
    own = tokenizer.encode_batch([*heads, "b", *(head + "b" for head in heads)])
    if any(own[at] + own[3] == own[4 + at] for at in range(3)):
        return plain  # it marks nothing
    left = set(range(len(texts)))
    for head in [before, *heads] if before else heads:
        tried = sorted(left)
        begun, *whole = tokenizer.encode_batch([head, *(head + texts[at] for at in tried)])
        for at, ids in zip(tried, whole, strict=True):
            if ids[: len(begun)] == begun:
                plain[at] = ids[len(begun) :]
                left.discard(at)
    return plain


def decode_behind(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids that go on after others: decoded alone, tokenizers that mark the beginning of
    a text would take away their first space."""
    whole, begun = tokenizer.decode([*before, *ids]), tokenizer.decode(before)
    return whole[len(begun) :] if whole.startswith(begun) else tokenizer.decode(ids)


def tail(tokenizer: Tokenizer, ids: Sequence[int], least: int = 32) -> Sequence[int]:
    """The last ids, as few as do for `decode_behind`: they decode to the end of the text."""
    text = tokenizer.decode(ids)
    while least < len(ids):
        end = tokenizer.decode(ids[-least:])
        if end and text.endswith(end):
            return ids[-least:]
        least *= 2
    return ids


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Trains a byte-level BPE that returns every text exactly; the same texts, which are read once,
    give the same tokenizer. A small text may not reach the size of the vocabulary."""
    at_least(SMALLEST_BPE, vocab_size=vocab_size)
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BpeTokenizer(backend.to_str(), "the trained tokenizer")


def parse_ranks(content: bytes, origin: str) -> dict[bytes, int]:
    """Byte string to rank, in the order of the ranks 0, 1, 2, ..., from lines "base64 rank". An
    `InputError` that names the ``origin`` if the content has another form, or a rank or a single
    byte is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{origin}, line {number}: {line[:40]!r} is not of the form 'base64 rank'"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(
            f"{origin} has {len(ranks)} tokens whose ranks are not 0, 1, ... in some order"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"{origin} has no rank for byte {missing[0]}; all 256 are needed")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))
