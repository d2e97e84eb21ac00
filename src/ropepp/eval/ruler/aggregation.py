"""Common and frequent words. RULER (arXiv 2404.06654), section 3.3."""

from collections.abc import Iterable
from functools import cache
from math import pi
from random import Random
from string import ascii_lowercase

from ropepp.eval.ruler.base import RulerTask, words
from ropepp.eval.tasks import Sample, SizedTask

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the "
    "above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
NUM_COMMON = 10
SHORT = 4096  # below it the lists repeat less
ZETA = pi**2 / 6  # zeta(2.0): word of rank k makes up k ** -2 / ZETA of the text
LETTERS = 6
TOKENS_A_WORD = 50  # of the prompt's length for each word of the coded vocabulary


class CommonWords(RulerTask, SizedTask):
    """Ten words are listed 30 times, the others 3 times, after one solved example; a size is a
    number of different words."""

    name = "cwe"
    max_new_tokens = 120
    smallest = NUM_COMMON + 1

    @property
    def largest(self) -> float:
        return len(_all_words())

    def draft(self, rng: Random, size: int, length: int) -> Sample:
        short = length < SHORT
        example, solution = _listed(rng, 20, 3, 1) if short else _listed(rng, 40, 10, 3)
        problem, answers = _listed(rng, size, 6, 1) if short else _listed(rng, size, 30, 3)
        return Sample(f"{example}{_numbered(solution)}\n{problem}", tuple(answers))


def _listed(rng: Random, size: int, common: int, others: int) -> tuple[str, list[str]]:
    """The question and its answers; `common` and `others` are numbers of repetitions."""
    drawn = rng.sample(_all_words(), size)
    listed = drawn[:NUM_COMMON] * common + drawn[NUM_COMMON:] * others
    rng.shuffle(listed)
    return COMMON.format(context=_numbered(listed)), drawn[:NUM_COMMON]


def _numbered(listed: Iterable[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))


@cache
def _all_words() -> tuple[str, ...]:
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind)}))


class FrequentWords(RulerTask, SizedTask):
    """Coded words with the frequencies of a zeta distribution, the first of them dots; a size is
    its number of words before rounding down."""

    name = "fwe"
    max_new_tokens = 50
    smallest = 100

    def draft(self, rng: Random, size: int, length: int) -> Sample:
        coded = {"...": None}
        while len(coded) < max(4, length // TOKENS_A_WORD):
            coded["".join(rng.choices(ascii_lowercase, k=LETTERS))] = None
        text = [
            word for rank, word in enumerate(coded, 1) for _ in range(int(size / rank**2 / ZETA))
        ]
        rng.shuffle(text)
        return Sample(FREQUENT.format(context=" ".join(text)), tuple(coded)[1:4])
