"""Variable tracking: a chain of assignments in noise. RULER (arXiv 2404.06654), section 3.2."""

from random import Random
from string import ascii_uppercase

from ropepp.eval.ruler.base import RulerTask
from ropepp.eval.ruler.niah import NOISE
from ropepp.eval.tasks import Sample, SizedTask

# "assgined" is the original's. Its space at the end is left out: the answer's tokens begin with it.
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {query}, they are:"
)
HOPS = 4
EXAMPLE_NOISE = 10  # what the original's rule, at most 500 tokens in steps of 5, comes to


class VariableTracking(RulerTask, SizedTask):
    """Asks for all variables that come to hold a value, after one solved example; a size is a
    number of repetitions of the noise."""

    name = "vt"
    max_new_tokens = 30
    smallest = HOPS + 2

    def draft(self, rng: Random, size: int, length: int) -> Sample:
        example, solution = _problem(rng, EXAMPLE_NOISE, letters=3)
        problem, answers = _problem(rng, size, letters=5)
        # The original has two spaces before the example's answer, and four line ends after it.
        prompt = f"{example}  {' '.join(solution)}\n\n\n\n{problem}"
        return Sample(prompt, tuple(answers))


def _problem(rng: Random, noises: int, letters: int) -> tuple[str, list[str]]:
    """The question and the variables."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(HOPS)]
    pieces = [NOISE + "\n"] * noises
    places = sorted(rng.sample(range(noises), len(chain)))
    for place, link in reversed(list(zip(places, chain, strict=True))):
        pieces.insert(place, link)
    question = TEMPLATE.format(context=" ".join(pieces), query=value, count=len(names))
    return question, names
