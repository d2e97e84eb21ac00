"""Makes src/ropepp/eval/babilong/stories.zip, which BABILong reads where bAbI itself is not given:
stories of the bAbI tasks 1 to 10 (arXiv 1502.05698) by their published rules, in bAbI's own format.

People move between places, take, drop and hand on objects; first places are drawn and not told. A
question is asked only where the facts imply one answer and no other. A story ends with one of up
to five questions that could have been asked on the way, so that its length varies as in bAbI.
"""

import io
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

from ropepp.eval.babilong import STAND_IN, Story
from ropepp.eval.babilong.scoring import PLACES
from ropepp.files import write_synced

STORIES_A_TASK = 500
QUESTIONS = 5  # a story ends with one of the first ones
NUMERALS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
FAMILY = ("Bill", "Fred", "Jeff", "Mary")  # of qa5
TOWNSPEOPLE = ("Bill", "Fred", "Julie", "Mary")  # of qa10
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
OBJECTS = ("apple", "football", "milk")
MOVED = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TOOK = ("got", "grabbed", "picked up", "took")
DROPPED = ("discarded", "dropped", "left", "put down")
GAVE = ("gave", "handed", "passed")

Pairs = list[tuple[str, str]]  # questions that could be asked, each with its answer


class World:
    """People who carry objects about.

    Actions return False, and nothing happens, where nobody can do them.
    """

    def __init__(self, rng: Random, people: tuple[str, ...] = PEOPLE) -> None:
        self.people, self.objects = people, OBJECTS
        self.facts: list[str] = []  # what happened, in sentences
        self.known: dict[str, str] = {}  # place of everybody and all, as far as the facts imply it
        # For each object the known places that it was in, one after another.
        self.paths: dict[str, list[str]] = {thing: [] for thing in OBJECTS}
        self.gifts: list[tuple[str, str, str]] = []  # giver, object, receiver
        self.handlers: list[str] = []  # of objects, in the order of the first time
        self._rng = rng
        self._place = {entity: rng.choice(PLACES) for entity in (*people, *OBJECTS)}
        self.carried: dict[str, list[str]] = {person: [] for person in people}

    def move(self) -> bool:
        """Somebody goes to another place, with all that they carry."""
        person = self._rng.choice(self.people)
        place = self._rng.choice([p for p in PLACES if p != self._place[person]])
        self.facts.append(f"{person} {self._rng.choice(MOVED)} the {place}.")
        for entity in (person, *self.carried[person]):
            self._place[entity] = self.known[entity] = place
        self._follow_paths()
        return True

    def take(self) -> bool:
        """Somebody takes an object that lies where they are."""
        held = {thing for things in self.carried.values() for thing in things}
        pairs = [(p, o) for p in self.people for o in self._here(p, self.objects) if o not in held]
        if not pairs:
            return False
        person, thing = self._rng.choice(pairs)
        self.facts.append(f"{person} {self._rng.choice(TOOK)} the {thing}{self._there()}.")
        self.carried[person].append(thing)
        self._meet(person, thing)
        return True

    def drop(self) -> bool:
        """Somebody drops an object."""
        pairs = [(p, o) for p in self.people for o in self.carried[p]]
        if not pairs:
            return False
        person, thing = self._rng.choice(pairs)
        self.facts.append(f"{person} {self._rng.choice(DROPPED)} the {thing}{self._there()}.")
        self.carried[person].remove(thing)
        self._meet(person, thing)
        return True

    def give(self) -> bool:
        """Somebody gives an object to somebody in the same place."""
        triples = [
            (p, o, q)
            for p in self.people
            for o in self.carried[p]
            for q in self._here(p, self.people)
            if q != p
        ]
        if not triples:
            return False
        giver, thing, receiver = self._rng.choice(triples)
        self.facts.append(f"{giver} {self._rng.choice(GAVE)} the {thing} to {receiver}.")
        self.carried[giver].remove(thing)
        self.carried[receiver].append(thing)
        self.gifts.append((giver, thing, receiver))
        self._meet(giver, receiver, thing)
        return True

    def _here(self, person: str, entities: Iterable[str]) -> list[str]:
        return [entity for entity in entities if self._place[entity] == self._place[person]]

    def _there(self) -> str:
        return self._rng.choice(("", " there"))

    def _meet(self, *entities: str) -> None:
        """All are in one place, and what they carry too: if it is known of one, it is of all."""
        people = [entity for entity in entities if entity in self.carried]
        self.handlers += [person for person in people if person not in self.handlers]
        group = [*entities, *(thing for person in people for thing in self.carried[person])]
        if any(entity in self.known for entity in group):
            self.known |= {entity: self._place[entity] for entity in group}
        self._follow_paths()

    def _follow_paths(self) -> None:
        for thing, path in self.paths.items():
            place = self.known.get(thing)
            if place is not None and path[-1:] != [place]:
                path.append(place)


class Whereabouts:
    """People of whom facts say where they are, where they are not, or in which of two places.

    Questions are about what the latest fact on a person says, so that a reader who keeps earlier
    facts and one who does not agree.
    """

    def __init__(
        self, rng: Random, people: tuple[str, ...] = PEOPLE, places: tuple[str, ...] = PLACES
    ) -> None:
        self.facts: list[str] = []
        self._rng, self._people, self._places = rng, people, places
        self._place = {person: rng.choice(places) for person in people}
        # Where the latest fact lets a person be; not in the dictionary if nothing was said.
        self._possible: dict[str, tuple[str, ...]] = {}

    def move(self) -> bool:
        """Somebody goes to another place."""
        person = self._rng.choice(self._people)
        place = self._rng.choice([p for p in self._places if p != self._place[person]])
        self._place[person] = place
        return self._say(person, f"{self._rng.choice(MOVED)} the {place}", (place,))

    def state(self) -> bool:
        """Says where somebody is."""
        person = self._rng.choice(self._people)
        place = self._place[person]
        return self._say(person, f"is in the {place}", (place,))

    def deny(self) -> bool:
        """Says where somebody is not."""
        person = self._rng.choice(self._people)
        place = self._rng.choice([p for p in self._places if p != self._place[person]])
        negation = self._rng.choice(("is not in", "is no longer in"))
        others = tuple(p for p in self._places if p != place)
        return self._say(person, f"{negation} the {place}", others)

    def waver(self) -> bool:
        """Names two places, in one of which somebody is; who was known to be in others has gone."""
        person = self._rng.choice(self._people)
        before = self._possible.get(person, ())
        two = self._rng.sample([p for p in self._places if p not in before], 2)
        self._place[person] = self._rng.choice(two)
        return self._say(person, f"is either in the {two[0]} or the {two[1]}", tuple(two))

    def pairs(self) -> list[tuple[str, str]]:
        """Questions with their answers: after a denial about the place that it names alone."""
        found = []
        for person, possible in self._possible.items():
            for place in self._places:
                if place not in possible:
                    answer = "no"
                elif len(possible) <= 2:
                    answer = "yes" if len(possible) == 1 else "maybe"
                else:
                    continue
                found.append((f"Is {person} in the {place}?", answer))
        return found

    def _say(self, person: str, what: str, possible: tuple[str, ...]) -> bool:
        self.facts.append(f"{person} {what}.")
        self._possible[person] = possible
        return True


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


def archive() -> bytes:
    """The file: a task's stories one after another, its number before each line, and behind each
    question its answer."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as file:
        for task, simulate in STORIES.items():
            lines = []
            for number in range(STORIES_A_TASK):
                story = simulate(Random(f"{task}/{number}"))
                asked = f"{story.question}\t{story.answer}"
                lines += [f"{at} {line}\n" for at, line in enumerate([*story.facts, asked], 1)]
            name = zipfile.ZipInfo(f"simulated/en-10k/{task}_simulated_test.txt")
            name.compress_type = zipfile.ZIP_LZMA
            file.writestr(name, "".join(lines))
    return content.getvalue()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else STAND_IN
    write_synced(target, archive())
