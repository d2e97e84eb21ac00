"""Questions about documents: SQuAD, HotpotQA, or a stand-in made from public speeches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from ropepp.errors import InputError
from ropepp.eval.ruler.background import sentences, speech_files, speeches
from ropepp.records import read_json

SQUAD, HOTPOT = "squad.json", "hotpotqa.json"
WORDS = 120  # of an excerpt, about what a paragraph of SQuAD has
QUOTED = range(10, 31)  # words of a sentence that a question may quote
CARDS = 20  # other messages' cards beside the one that a question needs


@dataclass(frozen=True)
class Question:
    """A question on some documents of a pool, which are told by their indices."""

    query: str
    answers: tuple[str, ...]  # any of them
    needed: tuple[int, ...]  # documents that answer it
    near: tuple[int, ...] = ()  # documents that come along before any others


@dataclass(frozen=True)
class Pool:
    """Documents and questions; `baseline` is the share of the most frequent answer."""

    documents: Sequence[str]
    questions: Sequence[Question]
    baseline: float = 0.0


@cache
def read_squad(path: Path) -> Pool:
    """SQuAD 2.0's answerable development set; an `InputError` if the file has another form."""
    try:
        articles = [article["paragraphs"] for article in read_json(path)["data"]]
        documents, number_of = _numbered(p["context"] for a in articles for p in a)
        questions = []
        for article in articles:
            near = [number_of[paragraph["context"]] for paragraph in article]
            for paragraph in article:
                own = number_of[paragraph["context"]]
                rest = tuple(dict.fromkeys(other for other in near if other != own))
                questions += [
                    Question(qa["question"], tuple(a["text"] for a in qa["answers"]), (own,), rest)
                    for qa in paragraph["qas"]
                    if not qa["is_impossible"]
                ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not of the form of SQuAD 2.0: {error!r}") from error
    return _checked(Pool(documents, questions), path)


@cache
def read_hotpot(path: Path) -> Pool:
    """The development set of HotpotQA with distractors; an `InputError` if it has another form."""
    try:
        rows = read_json(path)
        told = [[f"{title}\n{''.join(text)}" for title, text in row["context"]] for row in rows]
        documents, number_of = _numbered(document for group in told for document in group)
        questions = [
            Question(
                row["question"], (row["answer"],), tuple(dict.fromkeys(number_of[d] for d in group))
            )
            for row, group in zip(rows, told, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not of the form of HotpotQA: {error!r}") from error
    return _checked(Pool(documents, questions), path)


@cache
def speech_years() -> Pool:
    """Stand-in for SQuAD: in which year was the message with a given sentence sent?"""
    documents, questions = [], []
    for path, excerpts in zip(speech_files(), _excerpts(), strict=True):
        year, name = _sent(path)
        for excerpt in excerpts:
            documents.append(f"Message of President {name} in {year}\n{' '.join(excerpt)}")
            query = "In which year was the message sent that says: {}?"
            questions += _quotes(excerpt, query, year, (len(documents) - 1,), ())
    return _stand_in(documents, questions)


@cache
def speech_presidents() -> Pool:
    """Stand-in for HotpotQA: who sent the message with a given sentence? One document has the
    sentence and the message's number, another one the number and the president."""
    paths = speech_files()
    names = [_sent(path)[1] for path in paths]
    numbers = Random("numbers of messages").sample(range(100, 1000), len(paths))
    documents = [
        f"Card of message {number}\nMessage {number} was sent by President {name}."
        for number, name in zip(numbers, names, strict=True)
    ]
    questions = []
    for card, excerpts in enumerate(_excerpts()):
        others = Random(f"cards beside {card}").sample(range(len(paths)), CARDS + 1)
        near = tuple(other for other in others if other != card)[:CARDS]
        for excerpt in excerpts:
            documents.append(f"Excerpt of message {numbers[card]}\n{' '.join(excerpt)}")
            query = "Which president sent the message that says: {}?"
            needed = (len(documents) - 1, card)
            questions += _quotes(excerpt, query, names[card], needed, near)
    return _stand_in(documents, questions)


def _sent(path: Path) -> tuple[str, str]:
    """Year and president, from YEAR-NAME-NUMBER.txt."""
    year, *name, _ = path.stem.split("-")
    return year, " ".join(name)


@cache
def _excerpts() -> tuple[list[list[str]], ...]:
    """For each speech its sentences in groups of about `WORDS` words."""
    speeches_excerpts = []
    for text in speeches():
        groups: list[list[str]] = [[]]
        for sentence in sentences(text):
            if sum(len(s.split()) for s in groups[-1]) + len(sentence.split()) > WORDS:
                groups.append([])
            groups[-1].append(sentence)
        speeches_excerpts.append([group for group in groups if group])
    return tuple(speeches_excerpts)


@cache
def _times_said() -> Counter[str]:
    return Counter(s for excerpts in _excerpts() for excerpt in excerpts for s in excerpt)


def _quotes(
    excerpt: list[str], query: str, answer: str, needed: tuple[int, ...], near: tuple[int, ...]
) -> list[Question]:
    """A question on the excerpt's longest quotable sentence that is said nowhere else, or none."""
    times = _times_said()
    can = [s for s in excerpt if len(s.split()) in QUOTED and '"' not in s and times[s] == 1]
    if not can:
        return []
    return [Question(query.format(f'"{max(can, key=len)}"'), (answer,), needed, near)]


def _stand_in(documents: Sequence[str], questions: list[Question]) -> Pool:
    """A pool whose first questions are about any speeches."""
    Random("order of questions").shuffle(questions)
    answers = Counter(question.answers[0] for question in questions)
    return Pool(documents, questions, max(answers.values()) / answers.total())


def _numbered(texts: Any) -> tuple[list[str], dict[str, int]]:
    documents = sorted(set(texts))
    return documents, {document: number for number, document in enumerate(documents)}


def _checked(pool: Pool, path: Path) -> Pool:
    if not pool.questions or not all(question.answers for question in pool.questions):
        raise InputError(f"{path} has no questions, or one without an answer")
    return pool
