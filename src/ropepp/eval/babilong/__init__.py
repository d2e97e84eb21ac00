"""BABILong (arXiv 2406.10149): facts of bAbI among other sentences, at any length."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random

from ropepp.data.tokens.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.eval.babilong.original import FOLDER, read_stories
from ropepp.eval.babilong.prompts import PROMPTS
from ropepp.eval.babilong.scoring import scores
from ropepp.eval.babilong.stories import STORIES, Story
from ropepp.eval.ruler.background import given, sentences, speech_files
from ropepp.eval.tasks import Draft, Sample, SizedTask, Task, count_tokens

BOOKS = "pg19"
MIN_WORDS = 8  # of a sentence of the background; the original has 10 tokens of GPT-2
# Share of a simulated task's most frequent answer; of 20,000 stories where it is no fraction.
BASELINES = {
    "qa1": 1 / 6,
    "qa2": 1 / 6,
    "qa3": 1 / 6,
    "qa4": 1 / 6,
    "qa5": 0.19,
    "qa6": 1 / 2,
    "qa7": 0.50,
    "qa8": 0.45,
    "qa9": 1 / 2,
    "qa10": 1 / 3,
}


@dataclass(frozen=True)
class FactQuestions(SizedTask):
    """A question on facts that lie in their order among a background's sentences.

    A size is the background's number of words. Length 0 asks for facts alone.
    """

    name: str
    story: Callable[[Random], Story]
    books: tuple[Path, ...]
    official: bool
    baseline: float

    suite = "babilong"
    max_new_tokens = 20
    smallest = 0

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        if length:
            return super().samples(tokenizer, length, count, seed)
        found = []
        for index in range(count):
            draft = self.draft(Random(f"babilong/{self.name}/{seed}/{index}"), 0, 0)
            tokens = count_tokens(tokenizer, draft.prompt) + self.max_new_tokens
            info = draft.info | {"size": 0}
            found.append(Sample(index, draft.prompt, draft.answers, tokens, info))
        return found

    def draft(self, rng: Random, size: int, length: int) -> Draft:
        story = self.story(rng)
        background = self._background(rng, size)
        places = sorted(rng.choices(range(len(background) + 1), k=len(story.facts)))
        pieces = list(background)
        for place, fact in reversed(list(zip(places, story.facts, strict=True))):
            pieces.insert(place, fact)
        context = " ".join(pieces)
        prompt = PROMPTS[self.name].text(context, story.question)
        info = {
            "question": story.question,
            "facts": len(story.facts),
            "depth": _depths(prompt, context, pieces, places),
        }
        return Draft(prompt, (story.answer,), info)

    def _background(self, rng: Random, size: int) -> list[str]:
        """Sentences from a random place of a random book on, the last one cut."""
        found: list[str] = []
        while size > 0:
            book = _book(rng.choice(self.books))
            start = rng.randrange(len(book))
            for sentence in book[start:]:
                words = sentence.split()
                found.append(" ".join(words[:size]))
                size -= len(words)
                if size <= 0:
                    break
        return found

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        return scores(self.name, sample.info["question"], sample.answers[0], output)


def babilong_tasks(data: Path | None) -> list[Task]:
    """qa1 to qa10.

    Args:
        data: A folder with the original's files, both optional: bAbI as `tasks_1-20_v1-2` or
            `tasks_1-20_v1-2.zip`, and books of PG-19 as `pg19/*.txt`. Simulated stories and public
            speeches stand in for what is missing, and the tasks are official only with both.

    Raises:
        InputError: A given file has another form, or the package with the speeches is missing.
    """
    original = given(data, FOLDER) or given(data, f"{FOLDER}.zip")
    folder = given(data, BOOKS)
    books = speech_files() if folder is None else tuple(sorted(folder.glob("*.txt")))
    if not books:
        raise InputError(f"{folder} has no .txt files")
    official = original is not None and folder is not None
    tasks: list[Task] = []
    for name, simulate in STORIES.items():
        story, baseline = simulate, BASELINES[name]
        if original is not None:
            stories = read_stories(original, name)
            answers = Counter(story.answer for story in stories)
            story, baseline = partial(_pick, stories), max(answers.values()) / len(stories)
        tasks.append(FactQuestions(name, story, books, official, baseline))
    return tasks


def _pick(stories: list[Story], rng: Random) -> Story:
    return rng.choice(stories)


@lru_cache(maxsize=512)
def _book(path: Path) -> list[str]:
    found = [
        s for s in sentences(path.read_text(encoding="utf-8")) if s.count(" ") >= MIN_WORDS - 1
    ]
    if not found:
        raise InputError(f"{path} has no sentence of {MIN_WORDS} words or more")
    return found


def _depths(prompt: str, context: str, pieces: list[str], places: list[int]) -> list[float]:
    """Where the facts begin, as shares of the prompt's characters."""
    starts = [prompt.index(context)]
    for piece in pieces:
        starts.append(starts[-1] + len(piece) + 1)
    return [round(starts[place + number] / len(prompt), 4) for number, place in enumerate(places)]
