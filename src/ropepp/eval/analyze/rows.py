"""Rows of tokens on which a saved model is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ropepp.data.recall.accuracy import STREAM
from ropepp.data.tokenizer import Tokenizer
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError
from ropepp.eval.perplexity import read_text
from ropepp.interop.saved import SavedModel

if TYPE_CHECKING:
    from ropepp.data.recall.task import RecallDataModule

LENGTH = 1024  # tokens in a row of a model that names no data
BATCH_TOKENS = 1 << 13  # that an analysis reads at a time
RECALL_UNIT = "rows of recall"


@dataclass(frozen=True)
class TextRows:
    """Rows that are read as one document each, from position 0."""

    ids: Tensor  # (B, T + 1) int64: T inputs, and the target of the last one
    source: str  # where they are from, for people
    unit: str  # what a row is, in the plural

    @property
    def inputs(self) -> Tensor:
        """(B, T)"""
        return self.ids[:, :-1]


def read_rows(
    saved: SavedModel,
    rows: int,
    length: int | None = None,
    texts: Sequence[Path] = (),
    tokenizer: str | None = None,
) -> TextRows:
    """At most so many rows of text files, or of the validation split of the model's own data. An
    `InputError` if there is no such text, or none long enough.

    A row has T = ``length`` tokens, unless given those of the model's training rows, or less where
    documents are shorter. ``texts`` are files as `read_text` takes them, cut into pieces of T
    tokens; the last piece of a file is left out if it is shorter. For their ``tokenizer`` see
    `SavedModel.tokenizer`."""
    wanted = length or saved.data_arguments.get("sequence_length", LENGTH)
    if texts:
        return _pieces(texts, saved.tokenizer(tokenizer), rows, wanted)
    name = saved.data_class
    if name == "CorpusDataModule":
        meta = Corpus.open(saved.corpora[0], "validation").meta
        saved.require_tokenizer(meta.tokenizer_fingerprint, saved.corpora[0])
        return beginnings(saved.corpora[0], rows, wanted, exact=length is not None)
    if name == "RecallDataModule":
        batch = recall_batch(saved, rows, length)
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 1))
        return TextRows(ids, "associative recall", RECALL_UNIT)
    found = f"the data of {saved.path} is {name}" if name else f"{saved.path} names no data"
    raise InputError(f"{found}: rows come from a corpus, from recall, or from files (--text)")


def recall_data(saved: SavedModel) -> "RecallDataModule":
    """The data of a model that was trained on associative recall; of another an `InputError`."""
    if saved.data_class != "RecallDataModule":
        raise InputError(
            f"the data of {saved.path} is {saved.data_class or 'unknown'}: recall is for models"
            " trained on it (configs/experiment/recall.yaml)"
        )
    from ropepp.data.recall.task import RecallDataModule

    return RecallDataModule(**saved.data_arguments)


def recall_batch(
    saved: SavedModel, rows: int, length: int | None, seed: int = 0
) -> dict[str, Tensor]:
    """Rows of recall that were seen in no training, of the trained length unless given."""
    from ropepp.data.recall.task import RecallRows

    data = recall_data(saved)
    sizes = (length or data.sequence_length, data.pairs, data.vocab_size, rows)
    return RecallRows(*sizes, None, seed, STREAM).batch(range(rows))


def beginnings(folder: str, rows: int, length: int, exact: bool = True) -> TextRows:
    """The beginnings of the longest documents of a corpus's validation split; packed rows would
    blur what is at a document's start. If ``exact``, documents that are too short are left out;
    otherwise all rows get as short as the shortest of these documents. An `InputError` if there is
    no such corpus, or no document is long enough."""
    corpus = Corpus.open(folder, "validation")
    sizes = np.diff(corpus.offsets)
    longest = np.argsort(-sizes, kind="stable")[:rows]
    if exact:
        longest = longest[sizes[longest] > length]
    if not len(longest) or sizes[longest].min() < 2:
        raise InputError(
            f"length is {length}; the longest document in the validation split of {folder} has"
            f" {sizes.max()} tokens: allowed are 1 to {sizes.max() - 1}"
        )
    T = min(length, int(sizes[longest].min()) - 1)
    pieces = [corpus.tokens[start : start + T + 1] for start in corpus.offsets[longest]]
    ids = torch.from_numpy(np.stack(pieces).astype(np.int64))
    return TextRows(ids, f"validation split of {folder}", "documents")


def _pieces(texts: Sequence[Path], tokenizer: Tokenizer, rows: int, length: int) -> TextRows:
    """Pieces of texts one after another, each with the tokenizer's BOS if it has one."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    size = length + 1 - len(begin)
    found: list[list[int]] = []
    for path in texts:
        ids = tokenizer.encode_batch([read_text(path).text])[0]
        found += [begin + ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    if not found:
        names = ", ".join(map(str, texts))
        raise InputError(f"length is {length}; no text of {names} has that many tokens")
    source = ", ".join(path.name for path in texts)
    return TextRows(torch.tensor(found[:rows]), source, "pieces")
