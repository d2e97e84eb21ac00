"""What the tasks of RULER share: how samples become as long as asked, scoring, words.

There are two editions of RULER's generator. `CURRENT` is its authors' own. `OPENCOMPASS` is that of
OpenCompass 0.4.2, which made the paper's numbers, and which follows RULER as it was in 2024. Both
find a size (words, noises, documents) for all samples of a length at first, and take a fixed step
away where a sample turns out too long with it: a prompt is full, or a step shorter.

All that is random comes from the same generators in the same order as there, so that a seed gives
the samples that it gives there, where texts are cut into sentences as there.
"""

import re
import tomllib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError, optional
from ropepp.eval.ruler.background import sentences, split_at_stops
from ropepp.eval.tasks import FULL, Sample, Task

PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
LONG = 4096  # from here on steps are wider, and lists repeat more
SAME = 10  # drawings of a sample of at most a step until smaller ones are tried; RULER never does
ATTEMPTS = 100
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Edition:
    """What differs between generators."""

    split: Callable[[str], list[str]]  # cuts an essay where needles may go in
    in_steps: bool  # sizes are numbers of steps, found with the answers counted too, or exact
    example: bool  # whether vt has a solved example, and an assignment a line of its own
    gap: str  # between cwe's example and its answers
    fwe_tokens: int  # of the length, left for the answer of fwe
    qa_tokens: int  # the same of qa


CURRENT = Edition(sentences, False, True, " ", 50, 32)
OPENCOMPASS = Edition(split_at_stops, True, False, "", 0, 50)


class Draw:
    """What the samples of a seed are drawn from, one after another; their length is that of prompt
    and answer, without a BOS, as in the original."""

    def __init__(self, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.rng, self.numbers = Random(seed), np.random.RandomState(seed % 2**32)
        self.index = 0  # of the sample
        self.example: Sample | None = None

    def shuffle(self, items: list[Any]) -> list[Any]:
        """The items in an order that is the same in all samples of a seed, as in the original: the
        document with the answer, for instance, is at one depth wherever there are as many."""
        Random(self.seed).shuffle(items)
        return items

    def tokens(self, text: str) -> int:
        """Their number."""
        return len(self.tokenizer.encode_batch([text])[0])


@dataclass(frozen=True, kw_only=True)
class RulerTask(Task):
    """Scores by the share of the expected strings that the output holds, case ignored; with
    `any_answer`, 1 if it holds one of them. Sizes are from `smallest` to `largest`.
    """

    edition: Edition = CURRENT

    suite = "ruler"
    official = True
    baseline = 0.0
    any_answer: ClassVar[bool] = False
    smallest: ClassVar[int] = 1

    @property
    def largest(self) -> float:
        return inf

    @abstractmethod
    def draft(self, draw: Draw, size: int) -> Sample:
        """A sample of a size; longer for greater sizes."""

    @abstractmethod
    def step(self, length: int) -> int:
        """What is taken from the size of a sample that is too long."""

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        draw = Draw(tokenizer, length, seed)
        size = self.size(draw)
        found: list[Sample] = []
        for draw.index in range(count):
            sample = self.fit(draw, size)
            if sample is None:
                raise self.too_short(length)
            found.append(sample)
        return found

    def size(self, draw: Draw) -> int:
        """That of all samples, unless they are too long with it; an `InputError` if the greatest
        size does not fill the length."""
        step = self.step(draw.length)
        if self.edition.in_steps:
            size, tokens = step, 0
            while tokens < draw.length and size <= self.largest:
                tokens = self.tokens(draw, size, answered=True)
                size += step if tokens <= draw.length else -step
            return max(self.smallest, int(min(size, self.largest)))
        best = self._greatest(draw, step, self.bound(draw, step))
        if best is None:  # where RULER has no sample
            best = self._greatest(draw, self.smallest, step - 1)
        if best == self.largest and (reached := self.tokens(draw, best)) < FULL * draw.length:
            raise InputError(
                f"length is {draw.length}; ruler {self.name} reaches {reached} tokens with all "
                "words that there are, counted with this tokenizer"
            )
        return best or self.smallest

    def _greatest(self, draw: Draw, low: int, high: int) -> int | None:
        """The greatest size tried, of these, that fits."""
        best = None
        while low <= high:
            middle = (low + high) // 2
            if middle <= self.largest and self.tokens(draw, middle) <= draw.length:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def bound(self, draw: Draw, step: int) -> int:
        """A size beyond the greatest that fits."""
        each = draw.tokens(self.draft(draw, step).prompt) / step
        return max(int(draw.length / each * 3), 2 * step)

    def tokens(self, draw: Draw, size: int, answered: bool = False) -> int:
        """Of a sample of a size and of its answer, counted twice where the search does so."""
        sample = self.draft(draw, size)
        answers = f" {' '.join(sample.answers)}" if answered else ""
        return draw.tokens(sample.prompt + answers) + self.max_new_tokens

    def fit(self, draw: Draw, size: int) -> Sample | None:
        """The next sample; None if it is too long in any size."""
        step = self.step(draw.length)
        for attempt in range(ATTEMPTS):
            sample = self.finish(draw, self.draft(draw, size))
            if draw.tokens(sample.prompt) + self.max_new_tokens <= draw.length:
                return sample
            if size <= self.least(draw):
                return None
            smaller = step if size > step else int(attempt >= SAME)
            size = max(self.smallest, size - smaller)
        return None

    def finish(self, draw: Draw, sample: Sample) -> Sample:
        """A sample with what is not drawn while the size is looked for."""
        return sample

    def least(self, draw: Draw) -> int:
        """A size of the sample below which no smaller one is shorter."""
        return 0

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        text = _CONTROL.sub("\n", output).strip().lower()
        hits = [answer.lower() in text for answer in sample.answers]
        return {"score": float(any(hits)) if self.any_answer else sum(hits) / len(hits)}


@cache
def words(category: str) -> tuple[str, ...]:
    """The words of a category of wonderwords ("noun", "adjective" or "verb"), sorted; an
    `InputError` if that package is missing."""
    source = optional("wonderwords", "eval", "RULER").RandomWord()
    return tuple(sorted(set(source.filter(include_categories=[category]))))
