"""BABILong (arXiv 2406.10149): facts of bAbI among other sentences, at any length."""

import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf
from pathlib import Path
from random import Random
from zipfile import ZipFile

from ropepp.data.text.documents import BOM, decode
from ropepp.data.text.readers import read_text
from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.eval.babilong.scoring import scores
from ropepp.eval.ruler.background import given, sentences, speech_files
from ropepp.eval.tasks import FULL, Sample, Task
from ropepp.generate.text import document_ids
from ropepp.model.plain import understanding
from ropepp.records import read_json

# What stands before the context, by task.
PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
STORIES_FILE, PART = "tasks_1-20_v1-2.zip", "en-10k"
STAND_IN = Path(__file__).with_name("stories.zip")  # of scripts/simulate_babi.py
BOOKS = "pg19"
MIN_WORDS = 8  # of a sentence of the background; the original has 10 tokens of GPT-2
AIM = 0.995  # share of the length that the search for a prompt tries
MIN_SLOPE = 1e-3
ATTEMPTS = 50  # drawings of a sample whose smallest prompt is too long


@dataclass(frozen=True)
class Story:
    """Facts in their order, a question about them and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class BabilongTask(Task):
    """What both kinds below share."""

    name: str
    baseline: float

    suite = "babilong"
    max_new_tokens = 20

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        return scores(self.name, sample.question, sample.answers[0], output)


@dataclass(frozen=True)
class FactQuestions(BabilongTask):
    """A question on facts that lie in their order among a background's sentences.

    A size is the background's number of words.
    """

    stories: tuple[Story, ...]
    books: tuple[Path, ...]
    official: bool

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        # A sample aside finds out how large they are; all others begin their search there.
        prompts = [self.draft(Random("rate"), size).prompt for size in (0, 100)]
        least, more = (len(document_ids(tokenizer, x)) + self.max_new_tokens for x in prompts)
        slope = max(MIN_SLOPE, (more - least) / 100)
        size = max(0, int((length - least) / slope))
        size, tokens, _ = self._sample(tokenizer, length, "0/probe", size, slope)
        slope, start = max(MIN_SLOPE, (tokens - least) / max(1, size)), int(AIM * size)
        return [
            self._sample(tokenizer, length, f"{seed}/{index}", start, slope)[2]
            for index in range(count)
        ]

    def _sample(
        self, tokenizer: Tokenizer, length: int, key: str, start: int, slope: float
    ) -> tuple[int, int, Sample]:
        """Size, tokens, sample of a prompt of `FULL` to 1 times the length, or the largest."""
        for attempt in range(ATTEMPTS):
            low, high, size, found = -1, inf, start, None
            while low + 1 < high:
                size = int(min(max(size, low + 1), high - 1))
                rng = Random(f"{self.suite}/{self.name}/{key}/{attempt}")
                sample = self.draft(rng, size)
                tokens = len(document_ids(tokenizer, sample.prompt)) + self.max_new_tokens
                if tokens > length:
                    high = size
                    size -= ceil((tokens - length) / slope)
                else:
                    found = size, tokens, sample
                    if tokens >= FULL * length:
                        break
                    low = size
                    size += int((AIM * length - tokens) / slope)
            if found is not None:
                return found
        raise self.too_short(length)

    def draft(self, rng: Random, size: int) -> Sample:
        """A sample of a size from 0 on, the same for equal states of `rng`; it grows with that."""
        story = rng.choice(self.stories)
        pieces = self._background(rng, size)
        places = sorted(rng.choices(range(len(pieces) + 1), k=len(story.facts)))
        for place, fact in reversed(list(zip(places, story.facts, strict=True))):
            pieces.insert(place, fact)
        return _sample(self.name, " ".join(pieces), story.question, story.answer)

    def _background(self, rng: Random, size: int) -> list[str]:
        """Sentences from a random place of a random book on, the last one cut."""
        found: list[str] = []
        while size > 0:
            book = _book(rng.choice(self.books))
            start = rng.randrange(len(book))
            for sentence in book[start:]:
                words = sentence.split()
                found.append(" ".join(words[:size]))
                size -= len(words)
                if size <= 0:
                    break
        return found


@dataclass(frozen=True)
class PublishedQuestions(BabilongTask):
    """The samples of a folder of BABILong's own files, in their order, whatever the tokenizer."""

    folder: Path

    official = True

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        rows = read_split(self.folder, length)
        if count > len(rows):
            raise InputError(f"{count} samples are asked of {self.folder}, which has {len(rows)}")
        return [
            _sample(self.name, row["input"].strip(), row["question"], row["target"])
            for row in rows[:count]
        ]


def babilong_tasks(data: Path | None) -> list[Task]:
    """qa1 to qa10. ``data`` is a folder with the original's files, all optional: BABILong's own
    samples of a task as `qa1/4k.json`; or bAbI as `tasks_1-20_v1-2.zip`, and books of PG-19 as
    `pg19/*.txt`. Simulated stories and public speeches stand in for what is
    missing, and the tasks are official only with both. An `InputError` if a given file has another
    form, or the package with the speeches is missing."""
    original, folder = given(data, STORIES_FILE), given(data, BOOKS)
    official = original is not None and folder is not None
    tasks: list[Task] = []
    for name in PROMPTS:
        stories = tuple(read_stories(original or STAND_IN, name))
        baseline = max(Counter(one.answer for one in stories).values()) / len(stories)
        if (samples := given(data, name)) is not None:
            tasks.append(PublishedQuestions(name, baseline, samples))
        else:
            tasks.append(FactQuestions(name, baseline, stories, _books(folder), official))
    return tasks


def read_stories(path: Path, task: str) -> list[Story]:
    """The test stories of a task ("qa1", ...), one for each question, in `tasks_1-20_v1-2.zip`; an
    `InputError` if its file is missing or has another form."""
    pattern = f"{PART}/{task}_*_test.txt"
    with understanding(path), ZipFile(path) as archive:
        found = [name for name in archive.namelist() if Path(name).match(f"*/{pattern}")]
        if not found:
            raise InputError(f"{path} has no file {pattern}")
        name = f"{path}/{found[0]}"
        text = decode(archive.read(found[0]), name).removeprefix(BOM)
    stories: list[Story] = []
    facts: list[str] = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        place, _, rest = line.strip().partition(" ")
        if not place.isdecimal() or not rest:
            raise InputError(f"{name}, line {number}: {line[:40]!r} is not 'number text'")
        if place == "1":
            facts = []
        if "\t" in rest:
            question, answer = rest.split("\t")[:2]
            stories.append(Story(tuple(facts), question.strip(), answer.strip()))
        else:
            facts.append(rest.strip())
    if not stories:
        raise InputError(f"{name} has no questions")
    return stories


def read_split(folder: Path, length: int) -> list[dict[str, str]]:
    """Samples as BABILong has published them, `4k.json` for a length of 4096, each with "input",
    "question" and "target"; an `InputError` if there is no such file, or it has another form."""
    path = folder / f"{length // 1024}k.json"
    if length % 1024 or not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*k.json"))) or "none"
        raise InputError(f"length is {length}; {folder} has other files alone: {there}")
    content = read_json(path)
    keys = ("input", "question", "target")
    whole = isinstance(content, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
        for row in content
    )
    if not whole:
        raise InputError(f"{path} is no list of objects with {', '.join(keys)}")
    return list(content)


def _books(folder: Path | None) -> tuple[Path, ...]:
    books = speech_files() if folder is None else tuple(sorted(folder.glob("*.txt")))
    if not books:
        raise InputError(f"{folder} has no .txt files")
    return books


def _sample(name: str, context: str, question: str, answer: str) -> Sample:
    prompt = f"{PROMPTS[name]}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
    return Sample(prompt, (answer,), question)


@lru_cache(maxsize=512)
def _book(path: Path) -> list[str]:
    found = [s for s in sentences(read_text(path)) if s.count(" ") >= MIN_WORDS - 1]
    if not found:
        raise InputError(f"{path} has no sentence of {MIN_WORDS} words or more")
    return found
