"""Common and frequent words. RULER (arXiv 2404.06654), section 3.3."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import pi
from random import Random
from string import ascii_lowercase

from ropepp.data.tokenizer import Tokenizer
from ropepp.eval.ruler.base import LONG, PROMPTS, Draw, RulerTask, words
from ropepp.eval.tasks import Sample

NUM_COMMON = 10
SOUNDING = 4096  # words of the sample that tells how long others become
ZETA = pi**2 / 6  # zeta(2.0): word of rank k makes up k ** -2 / ZETA of the text
LETTERS = 6
TOKENS_A_WORD = 50  # of the prompt for each word of the coded vocabulary
STEPS = 32  # of fwe to the whole prompt
SMALLEST = 30  # of fwe: the three answers are said in it


@dataclass(frozen=True)
class CommonWords(RulerTask):
    """Ten words are listed 30 times, the others 3 times, after one solved example; a size is a
    number of different words."""

    name = "cwe"
    max_new_tokens = 120
    smallest = NUM_COMMON

    @property
    def largest(self) -> float:
        return len(_all_words())

    def step(self, length: int) -> int:
        return 10

    def draft(self, draw: Draw, size: int) -> Sample:
        short = draw.length < LONG
        example, solution = self._listed(draw, *((20, 3, 1) if short else (40, 10, 3)))
        problem, answers = self._listed(draw, size, *((6, 1) if short else (30, 3)))
        prompt = f"{example}{self.edition.gap}{_numbered(solution)}\n{problem}"
        return Sample(prompt, tuple(answers))

    def bound(self, draw: Draw, step: int) -> int:
        each = draw.tokens(self.draft(draw, SOUNDING).prompt) / SOUNDING
        return max(int(draw.length // each) * 2, 2 * step)

    def _listed(self, draw: Draw, size: int, common: int, others: int) -> tuple[str, list[str]]:
        """The question and its answers; `common` and `others` are numbers of repetitions."""
        drawn = draw.rng.sample(_shuffled(draw.seed), size)
        listed = draw.shuffle(drawn[:NUM_COMMON] * common + drawn[NUM_COMMON:] * others)
        return PROMPTS["cwe"].format(context=_numbered(listed)), drawn[:NUM_COMMON]


def _numbered(listed: Iterable[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))


@cache
def _all_words() -> tuple[str, ...]:
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind)}))


@lru_cache(maxsize=2)
def _shuffled(seed: int) -> list[str]:
    found = [*_all_words()]
    Random(seed).shuffle(found)
    return found


@dataclass(frozen=True)
class FrequentWords(RulerTask):
    """Coded words with the frequencies of a zeta distribution, the first of them dots; a size is
    its number of words before rounding down."""

    max_new_tokens: int

    name = "fwe"

    def step(self, length: int) -> int:
        return max(1, (length - self.max_new_tokens) // STEPS)

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        draw, room = Draw(tokenizer, length, seed), length - self.max_new_tokens
        ranked, size = self._ranked(draw), max(1, room // LETTERS)
        while draw.tokens(_coded(draw, ranked, size).prompt) < room:
            size += self.step(length)
        size -= self.step(length)
        found = []
        for _ in range(count):
            ranked, own = self._ranked(draw), size
            while draw.tokens((sample := _coded(draw, ranked, own)).prompt) > room:
                own -= self.step(length)
                if own < SMALLEST:
                    raise self.too_short(length)
            found.append(sample)
        return found

    def draft(self, draw: Draw, size: int) -> Sample:
        return _coded(draw, self._ranked(draw), size)

    def _ranked(self, draw: Draw) -> list[str]:
        """The vocabulary, the most frequent word first."""
        coded: set[str] = set()
        while len(coded) < max(4, (draw.length - self.max_new_tokens) // TOKENS_A_WORD):
            coded.add("".join(draw.rng.choices(ascii_lowercase, k=LETTERS)))
        return ["...", *draw.shuffle(sorted(coded))[1:]]


def _coded(draw: Draw, ranked: list[str], size: int) -> Sample:
    text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size / rank**2 / ZETA))]
    return Sample(PROMPTS["fwe"].format(context=" ".join(draw.shuffle(text))), tuple(ranked[1:4]))
