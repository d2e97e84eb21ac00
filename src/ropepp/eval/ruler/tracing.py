"""Variable tracking: a chain of assignments in noise. RULER (arXiv 2404.06654), section 3.2."""

from copy import copy
from dataclasses import dataclass, replace
from random import Random
from string import ascii_uppercase

from ropepp.eval.ruler.base import LONG, PROMPTS, Draw, RulerTask
from ropepp.eval.tasks import Sample

HOPS = 4
EXAMPLE_TOKENS = 500
EXAMPLE_LETTERS, EXAMPLE_VALUE = 3, "12345"  # until it stands before a problem


@dataclass(frozen=True)
class VariableTracking(RulerTask):
    """Asks for all variables that come to hold a value, after one solved example; a size is a
    number of repetitions of the noise."""

    is_example: bool = False  # whether this is the task that makes the example
    max_new_tokens: int = 30

    name = "vt"
    smallest = HOPS + 1

    def step(self, length: int) -> int:
        return 5 if length < LONG and self.edition.example else 10

    def size(self, draw: Draw) -> int:
        if self.edition.example and not self.is_example:
            short = copy(draw)
            short.length = EXAMPLE_TOKENS
            task = replace(self, is_example=True, max_new_tokens=0)
            draw.example = task.fit(short, task.size(short))
        return super().size(draw)

    def tokens(self, draw: Draw, size: int, answered: bool = False) -> int:
        own = super().tokens(draw, size, answered)
        return own + (draw.tokens(_solved(draw.example)) if draw.example else 0)

    def draft(self, draw: Draw, size: int) -> Sample:
        letters, value = EXAMPLE_LETTERS if self.is_example else 5, EXAMPLE_VALUE
        names = _names(draw.rng, letters)
        if not self.is_example:
            value = str(draw.numbers.randint(10_000, 99_999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(HOPS)]
        own_lines = self.edition.example
        pieces = [PROMPTS["noise"] + ("" if own_lines else "\n")] * size
        places = sorted(draw.rng.sample(range(size), len(chain)))
        for place, link in reversed(list(zip(places, chain, strict=True))):
            pieces.insert(place, link)
        context = ("\n" if own_lines else " ").join(pieces)
        problem = PROMPTS["vt"].format(context=context, query=value, count=len(names))
        return Sample(problem, tuple(names))

    def finish(self, draw: Draw, sample: Sample) -> Sample:
        """With the example before it, whose names and value are new in each sample."""
        if draw.example is None:
            return sample
        text = _solved(draw.example)
        for name in draw.example.answers:
            text = text.replace(name, "".join(draw.rng.choices(ascii_uppercase, k=len(name))))
        text = text.replace(EXAMPLE_VALUE, str(draw.numbers.randint(10_000, 99_999)))
        return replace(sample, prompt=f"{text}\n{sample.prompt}")


def _solved(example: Sample) -> str:
    return f"{example.prompt} {' '.join(example.answers)}\n"


def _names(rng: Random, letters: int) -> list[str]:
    """Different ones."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names
