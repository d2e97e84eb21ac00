"""Needles in a haystack: which value was said of a key? RULER (arXiv 2404.06654), section 3.1."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, chain, pairwise, zip_longest
from pathlib import Path
from random import Random
from typing import Any, Literal
from uuid import UUID

from ropepp.eval.ruler.background import essay_words
from ropepp.eval.ruler.base import LONG, PROMPTS, Draw, Edition, RulerTask, words
from ropepp.eval.tasks import Sample

DEPTHS = tuple(round(100 * number / 39) for number in range(40))  # per cent

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles(RulerTask):
    """Facts about keys in a haystack; asked for all values of one key or of several.

    A size is the number of words ("essay"), of repetitions ("noise") or of other needles
    ("needles").
    """

    name: str
    haystack: Literal["essay", "noise", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    essay: Path | None = None
    official: bool = True

    max_new_tokens = 128
    smallest = 5

    def step(self, length: int) -> int:
        if self.haystack == "essay":
            return 500
        return 25 if length >= LONG else 5

    def draft(self, draw: Draw, size: int) -> Sample:
        rng = draw.rng
        keys, values = [], []
        for _ in range(self.keys):
            keys.append(_draw(rng, self.key))
            values.append([_draw(rng, self.value) for _ in range(self.values)])
        needles = [
            self._needle(k, value) for k, own in zip(keys, values, strict=True) for value in own
        ]
        context = self._context(rng, size, draw.shuffle(needles))
        asked = rng.sample(range(self.keys), self.queries)
        answers = [value for number in asked for value in values[number]]
        names = [keys[number] for number in asked]
        query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
        template, kind = (
            ("one_needle", self.value[:-1]) if len(answers) == 1 else ("many_needles", self.value)
        )
        return Sample(
            PROMPTS[template].format(kind=kind, query=query, context=context), tuple(answers)
        )

    def _needle(self, key: str, value: str) -> str:
        return PROMPTS["needle"].format(kind=self.value, key=key, value=value)

    def _context(self, rng: Random, size: int, needles: list[str]) -> str:
        if self.haystack == "essay":
            return self._essay(rng, size, needles)
        kinds = self.key, self.value
        if self.haystack == "noise":
            pieces = [PROMPTS["noise"]] * size
        else:
            pieces = [self._needle(*(_draw(rng, kind) for kind in kinds)) for _ in range(size)]
        cuts = sorted(rng.sample(range(size), len(needles)))
        for cut, needle in reversed(list(zip(cuts, needles, strict=True))):
            pieces.insert(cut, needle)
        return "\n".join(pieces)

    def _essay(self, rng: Random, size: int, needles: list[str]) -> str:
        """Before a needle at the beginning or another's place is a second space, as published."""
        pieces = _pieces(self.essay, size, self.edition)
        cuts = [int(len(pieces) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles))]
        ends = [*sorted(cuts), len(pieces)]
        told = [" ".join(pieces[a:b]) for a, b in pairwise([0, *ends])]
        text = " ".join(chain.from_iterable(zip_longest(told, needles, fillvalue="")))
        return text.removesuffix(" ")


@lru_cache(maxsize=4)
def _pieces(essay: Path | None, size: int, edition: Edition) -> tuple[str, ...]:
    """Of the first words, which begin anew at their end."""
    text = essay_words(essay)
    return tuple(edition.split(" ".join((text * (size // len(text) + 1))[:size])))


def _draw(rng: Random, kind: Kind) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(_pairs())


class Pairs(Sequence[str]):
    """All "adjective-noun", sorted, each once, without a list of millions."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        ends = sorted(set(nouns))
        groups: list[tuple[str, list[str]]] = []
        for head in sorted({f"{adjective}-" for adjective in adjectives}):
            if groups and head.startswith(groups[-1][0]):  # "able-bodied-" lies within "able-"
                first, tails = groups.pop()
                mixed = {f"{head.removeprefix(first)}{noun}" for noun in ends}
                groups.append((first, sorted(mixed.union(tails))))
            else:
                groups.append((head, ends))
        self._groups = groups
        self._starts = [0, *accumulate(len(tails) for _, tails in groups)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        at = bisect_right(self._starts, index) - 1
        head, tails = self._groups[at]
        return head + tails[index - self._starts[at]]


@cache
def _pairs() -> Pairs:
    return Pairs(words("adjective"), words("noun"))
