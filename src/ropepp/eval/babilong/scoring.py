"""Whether an answer is right: the rule of BABILong, as meant and to the letter, and a simpler."""

from collections.abc import Iterable

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: dict[str, tuple[str, ...]] = {
    "qa1": PLACES,
    "qa2": PLACES,
    "qa3": PLACES,
    "qa4": PLACES,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
}


def scores(task: str, question: str, target: str, output: str) -> dict[str, float]:
    """Scores of an output, each 0 or 1.

    Returns:
        "score": The first sentence names the target's labels and no others, those of the question
            aside. A label inside another one is not named by it: "none" does not name "one".
        "official": The same without that exception, so that "none" is never right, as in the
            original.
        "simple": The first sentence holds the target.
    """
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    target, question = target.lower(), question.lower()
    labels = [label.lower() for label in LABELS[task]]
    wanted = set(target.split(","))
    result = {}
    for name, named in (("score", _named), ("official", _contained)):
        result[name] = float(named(said, labels) - named(question, labels) == wanted)
    return result | {"simple": float(target in said)}


def _contained(text: str, labels: Iterable[str]) -> set[str]:
    return {label for label in labels if label in text}


def _named(text: str, labels: Iterable[str]) -> set[str]:
    found = set()
    for label in sorted(labels, key=len, reverse=True):
        if label in text:
            found.add(label)
            text = text.replace(label, " ")
    return found
