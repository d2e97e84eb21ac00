"""Files in the formats of those that RULER downloads, made of public speeches."""

import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from random import Random

from ropepp.eval.ruler.background import sentences, speeches

NUM_SPEECHES = 12


def write_ruler_files(folder: Path) -> None:
    """Writes all three; the same at each call."""
    folder.mkdir(parents=True, exist_ok=True)
    text = " ".join(speeches()[:NUM_SPEECHES])
    said, rng = cycle(sentences(text)), Random(0)
    for _ in range(20_000):  # the hashes in golden/ruler are of files that drew these before
        rng.choices("abc", k=rng.randint(4, 10))
    contents = {
        "PaulGrahamEssays.json": {"text": text},
        "squad.json": {"version": "v2.0", "data": [_article(n, said, rng) for n in range(6)]},
        "hotpotqa.json": [_hotpot(n, said, rng) for n in range(40)],
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))


def _paragraph(said: Iterator[str], words: int) -> list[str]:
    found: list[str] = []
    while sum(len(sentence.split()) for sentence in found) < words:
        found.append(next(said))
    return found


def _article(number: int, said: Iterator[str], rng: Random) -> dict[str, object]:
    """Of 34 paragraphs with two questions that they answer and one that they do not."""
    paragraphs = []
    for place in range(34):
        own = _paragraph(said, rng.randint(70, 170))
        words = rng.choice(own).split()
        answer = {"text": " ".join(words[:3]), "answer_start": 0}
        questions = [
            {
                "id": f"{number}-{place}-{n}",
                "question": f"What is said ({n}) before {' '.join(words[3:9])}?",
                "answers": [] if n == 2 else [answer] * (n + 1),
                "is_impossible": n == 2,
                **({"plausible_answers": [answer]} if n == 2 else {}),
            }
            for n in range(3)
        ]
        paragraphs.append({"context": " ".join(own), "qas": questions})
    return {"title": f"Article {number}", "paragraphs": paragraphs}


def _hotpot(number: int, said: Iterator[str], rng: Random) -> dict[str, object]:
    """A question with ten documents."""
    context = [
        [f"Title {number}-{n}", [f"{s} " for s in _paragraph(said, rng.randint(20, 60))]]
        for n in range(10)
    ]
    return {
        "_id": str(number),
        "question": f"Who said in message {number} what the other one says?",
        "answer": "yes" if number % 5 == 0 else str(context[0][1][0].split()[0]),
        "supporting_facts": [[context[0][0], 0], [context[1][0], 0]],
        "context": context,
        "type": "bridge",
        "level": "hard",
    }
