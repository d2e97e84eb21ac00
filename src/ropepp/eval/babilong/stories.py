"""Stories of the bAbI tasks 1 to 10 (arXiv 1502.05698), simulated by their published rules.

People move between places, take, drop and hand on objects; first places are drawn and not told. A
question is asked only where the facts imply one answer and no other. A story ends with one of up
to five questions that could have been asked on the way, so that its length varies as in bAbI.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ropepp.eval.babilong.scoring import PLACES
from ropepp.eval.babilong.worlds import Whereabouts, World

QUESTIONS = 5  # a story ends with one of the first ones
NUMERALS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
FAMILY = ("Bill", "Fred", "Jeff", "Mary")  # of qa5
TOWNSPEOPLE = ("Bill", "Fred", "Julie", "Mary")  # of qa10
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")

Pairs = list[tuple[str, str]]  # questions that could be asked, each with its answer


@dataclass(frozen=True)
class Story:
    """Facts in their order, a question about them and its answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


def qa1(rng: Random) -> Story:
    """One supporting fact: where is a person?"""
    world = World(rng)

    def pairs() -> Pairs:
        return [(f"Where is {p}?", world.known[p]) for p in world.people if p in world.known]

    return _tell(rng, world.facts, [world.move], pairs, every=2)


def qa2(rng: Random) -> Story:
    """Two supporting facts: where is an object?"""
    world = World(rng)
    actions = [world.take, world.drop, world.move]

    def pairs() -> Pairs:
        return [(f"Where is the {o}?", world.known[o]) for o in world.objects if o in world.known]

    return _tell(rng, world.facts, actions, pairs, every=3, chance=0.5)


def qa3(rng: Random) -> Story:
    """Three supporting facts: where was an object before it came to a place, once?"""
    world = World(rng)
    actions = [world.take, world.drop, world.move]

    def pairs() -> Pairs:
        return [
            (f"Where was the {o} before the {after}?", before)
            for o, path in world.paths.items()
            for before, after in pairwise(path)
            if path.count(after) == 1
        ]

    return _tell(rng, world.facts, actions, pairs, every=3, chance=0.5)


def qa4(rng: Random) -> Story:
    """Two arguments: what lies on one side of the middle of three places?"""
    first, middle, last = rng.sample(PLACES, 3)
    side = rng.choice(("north", "east"))  # `first` lies there of `middle`, and so does it of `last`
    relations = [(first, side, middle), (middle, side, last)]
    rng.shuffle(relations)
    facts = [
        rng.choice(
            (f"The {one} is {d} of the {other}.", f"The {other} is {OPPOSITE[d]} of the {one}.")
        )
        for one, d, other in relations
    ]
    answer, direction = rng.choice(((first, side), (last, OPPOSITE[side])))
    forms = (f"{direction} of the {middle}", f"the {middle} {OPPOSITE[direction]} of")
    question = rng.choice((f"What is {forms[0]}?", f"What is {forms[1]}?"))
    return Story(tuple(facts), question, answer)


def qa5(rng: Random) -> Story:
    """Three arguments: who gave what to whom?"""
    world = World(rng, FAMILY)
    actions = [world.take, world.give, world.move]

    def pairs() -> Pairs:
        answers = defaultdict(set)
        for giver, thing, receiver in world.gifts:
            answers[f"What did {giver} give to {receiver}?"].add(thing)
            answers[f"Who gave the {thing} to {receiver}?"].add(giver)
            answers[f"Who did {giver} give the {thing} to?"].add(receiver)
            answers[f"Who gave the {thing}?"].add(giver)
            answers[f"Who received the {thing}?"].add(receiver)
        return [(question, min(given)) for question, given in answers.items() if len(given) == 1]

    return _tell(rng, world.facts, actions, pairs, every=3, chance=0.5)


def qa6(rng: Random) -> Story:
    """Yes or no: is a person in a place?"""
    world = World(rng)

    def pairs() -> Pairs:
        return [
            (f"Is {person} in the {place}?", "yes" if world.known[person] == place else "no")
            for person in world.people
            if person in world.known
            for place in PLACES
        ]

    return _tell(rng, world.facts, [world.move], pairs, every=2, answers=("yes", "no"))


def qa7(rng: Random) -> Story:
    """Counting: how many objects does a person carry?"""
    world = World(rng)

    def pairs() -> Pairs:
        return [
            (f"How many objects is {person} carrying?", NUMERALS[len(world.carried[person])])
            for person in world.handlers
        ]

    actions = [world.take, world.drop, world.give, world.move]
    return _tell(rng, world.facts, actions, pairs, every=2)


def qa8(rng: Random) -> Story:
    """Lists: what does a person carry?"""
    world = World(rng)

    def pairs() -> Pairs:
        return [
            (f"What is {person} carrying?", ",".join(world.carried[person]) or "nothing")
            for person in world.handlers
        ]

    actions = [world.take, world.drop, world.give, world.move]
    return _tell(rng, world.facts, actions, pairs, every=2)


def qa9(rng: Random) -> Story:
    """Negation: is a person in a place, where some facts say where people are not?"""
    world = Whereabouts(rng)
    actions = [world.move, world.state, world.deny]
    return _tell(rng, world.facts, actions, world.pairs, every=2, answers=("yes", "no"))


def qa10(rng: Random) -> Story:
    """Indefinite knowledge: is a person in a place, where some facts name two places?"""
    world = Whereabouts(rng, TOWNSPEOPLE, TOWN)
    actions = [world.move, world.state, world.waver]
    answers = ("yes", "no", "maybe")
    return _tell(rng, world.facts, actions, world.pairs, every=2, answers=answers)


STORIES: dict[str, Callable[[Random], Story]] = {
    story.__name__: story for story in (qa1, qa2, qa3, qa4, qa5, qa6, qa7, qa8, qa9, qa10)
}


def _tell(
    rng: Random,
    facts: list[str],
    actions: Sequence[Callable[[], bool]],
    pairs: Callable[[], Pairs],
    every: int,
    chance: float = 1.0,
    answers: Sequence[str] | None = None,
) -> Story:
    """Acts until the question that ends the story: questions have ``every`` facts or more between
    them, and ``chance`` is the probability of one then. Actions write down facts, and tell whether
    anything happened; ``answers``, if given, are all as likely."""
    left = rng.randint(1, QUESTIONS)
    wanted = None if answers is None else rng.choice(answers)
    since = 0
    while True:
        while not rng.choice(actions)():
            pass
        since += 1
        if since < every or rng.random() >= chance:
            continue
        options = [pair for pair in pairs() if left > 1 or wanted in (None, pair[1])]
        if options:
            left, since = left - 1, 0
            if not left:
                return Story(tuple(facts), *rng.choice(options))
