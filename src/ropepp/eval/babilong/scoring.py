"""Whether an answer is right: the rule of BABILong, as meant and to the letter, and a simpler."""

from collections.abc import Iterable

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9"), ("no", "yes")),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
}


def scores(task: str, question: str, target: str, output: str) -> dict[str, float]:
    """Scores of an output, each 0 or 1. "score": the first sentence names the target's labels and
    no others, those of the question aside; a label inside another one is not named by it: "none"
    does not name "one". "official": the same without that exception, so that "none" is never right,
    as in the original. "simple": the first sentence holds the target."""
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    target, question = target.lower(), question.lower()
    labels = [label.lower() for label in LABELS[task]]
    wanted = set(target.split(","))
    named = _named(said, labels) - _named(question, labels)
    contained = {label for label in labels if label in said and label not in question}
    return {
        "score": float(named == wanted),
        "official": float(contained == wanted),
        "simple": float(target in said),
    }


def _named(text: str, labels: Iterable[str]) -> set[str]:
    found = set()
    for label in sorted(labels, key=len, reverse=True):
        if label in text:
            found.add(label)
            text = text.replace(label, " ")
    return found
