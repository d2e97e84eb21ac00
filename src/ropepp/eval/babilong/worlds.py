"""Worlds of people, places and objects; what happens in them is written down in plain sentences."""

from collections.abc import Iterable
from random import Random

from ropepp.eval.babilong.scoring import PLACES

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
OBJECTS = ("apple", "football", "milk")
MOVED = ("moved to", "went to", "went back to", "journeyed to", "travelled to")
TOOK = ("got", "grabbed", "picked up", "took")
DROPPED = ("discarded", "dropped", "left", "put down")
GAVE = ("gave", "handed", "passed")


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
