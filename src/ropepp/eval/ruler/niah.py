"""Needles in a haystack: which value was said of a key? RULER (arXiv 2404.06654), section 3.1."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal
from uuid import UUID

from ropepp.eval.ruler.background import essay_words, sentences
from ropepp.eval.ruler.base import RulerTask, words
from ropepp.eval.tasks import Sample, SizedTask

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} "
    "for {query} mentioned in the provided text? The special magic {kind} for {query} mentioned "
    "in the provided text is"
)
MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic "
    "{kind} for {query} mentioned in the provided text? The special magic {kind} for {query} "
    "mentioned in the provided text are"
)
DEPTHS = tuple(round(100 * number / 39) for number in range(40))  # per cent

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles(RulerTask, SizedTask):
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
    smallest = 8

    def draft(self, rng: Random, size: int, length: int) -> Sample:
        facts: dict[str, list[str]] = {}
        while len(facts) < self.keys:
            facts[_draw(rng, self.key)] = [_draw(rng, self.value) for _ in range(self.values)]
        needles = [self._needle(key, value) for key in facts for value in facts[key]]
        rng.shuffle(needles)
        asked = rng.sample(list(facts), self.queries)
        answers = [value for key in asked for value in facts[key]]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        template, kind = (ONE, self.value[:-1]) if len(answers) == 1 else (MANY, self.value)
        prompt = template.format(
            kind=kind, query=query, context=self._context(rng, size, needles, asked)
        )
        return Sample(prompt, tuple(answers))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)

    def _context(self, rng: Random, size: int, needles: list[str], asked: list[str]) -> str:
        if self.haystack == "essay":
            pieces, cuts = self._essay(rng, size, len(needles))
        else:
            if self.haystack == "noise":
                pieces = [NOISE] * size
            else:
                pieces = [self._other(rng, asked) for _ in range(size)]
            cuts = sorted(rng.sample(range(size), len(needles)))
        for cut, needle in reversed(list(zip(cuts, needles, strict=True))):
            pieces.insert(cut, needle)
        return (" " if self.haystack == "essay" else "\n").join(pieces)

    def _essay(self, rng: Random, size: int, count: int) -> tuple[list[str], list[int]]:
        """Sentences of the first words, begun anew at the end, and where needles go in."""
        text = essay_words(self.essay)
        pieces = sentences(" ".join((text * (size // len(text) + 1))[:size]))
        places = sorted(rng.sample(DEPTHS, count))
        return pieces, [len(pieces) * place // 100 for place in places]

    def _other(self, rng: Random, asked: list[str]) -> str:
        while (key := _draw(rng, self.key)) in asked:
            pass
        return self._needle(key, _draw(rng, self.value))


def _draw(rng: Random, kind: Kind) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"
