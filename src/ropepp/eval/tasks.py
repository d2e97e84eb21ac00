"""What a long-context task is, and how its prompt is made as long as asked, in the model's tokens.

A sample is drawn from (seed, task, index) alone: the same whatever the number of samples.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, inf
from random import Random

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.generate.text import document_ids

FULL = 0.985  # share of the length at which a prompt is long enough
AIM = 0.995  # share of it that the search for a prompt tries
MIN_SLOPE = 1e-3
ATTEMPTS = 50  # drawings of a sample whose smallest prompt is too long


@dataclass(frozen=True)
class Sample:
    """A prompt and what a right answer holds.

    Attributes:
        prompt: What the model reads; its answer follows directly.
        answers: The expected strings.
        question: What is asked, where the score depends on it.
    """

    prompt: str
    answers: tuple[str, ...]
    question: str = ""


class Task(ABC):
    """A task of a suite.

    Attributes:
        suite: "ruler" or "babilong", with the protocol unless it is the official one.
        name: "niah_single_1", "qa1", ...
        max_new_tokens: Tokens that the model may answer.
        official: False where a background or data stands in for the original's.
        baseline: Score of the best constant answer, 0 to 1.
    """

    suite: str
    name: str
    max_new_tokens: int
    official: bool
    baseline: float

    @abstractmethod
    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        """Samples 0 to `count - 1` of a seed, each of at most `length` tokens, answer included.

        Raises:
            InputError: The task does not fit into the length.
        """

    @abstractmethod
    def score(self, output: str, sample: Sample) -> dict[str, float]:
        """Scores of a model's output, each 0 to 1; "score" comes first."""


class SizedTask(Task):
    """A task whose prompts grow with a number, such as the words of a background."""

    @abstractmethod
    def draft(self, rng: Random, size: int, length: int) -> Sample:
        """A sample of a size from 0 on, the same for equal states of `rng`; longer for greater
        sizes."""

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        # A sample aside finds out how large they are; all others begin their search there.
        prompts = [self.draft(Random("rate"), size, length).prompt for size in (0, 100)]
        least, more = (count_tokens(tokenizer, prompt) + self.max_new_tokens for prompt in prompts)
        slope = max(MIN_SLOPE, (more - least) / 100)
        size = max(0, int((length - least) / slope))
        size, tokens, _ = self._sample(tokenizer, length, "0/probe", size, slope)
        slope, start = max(MIN_SLOPE, (tokens - least) / max(1, size)), int(AIM * size)
        return [
            self._sample(tokenizer, length, f"{seed}/{index}", start, slope)[2]
            for index in range(count)
        ]

    def _sample(
        self, tokenizer: Tokenizer, length: int, key: str, size: int, slope: float
    ) -> tuple[int, int, Sample]:
        """Size, tokens and sample."""
        for attempt in range(ATTEMPTS):
            rng_seed = f"{self.suite}/{self.name}/{key}/{attempt}"
            found = self._fit(tokenizer, length, rng_seed, size, slope)
            if found is not None:
                return found
        raise InputError(
            f"length is {length}; {self.suite} {self.name} needs more, counted with this tokenizer"
        )

    def _fit(
        self, tokenizer: Tokenizer, length: int, rng_seed: str, size: int, slope: float
    ) -> tuple[int, int, Sample] | None:
        """Size, tokens and sample of a prompt of `FULL` to 1 times the length, or of the greatest
        size that fits; None if none does."""
        low, high, found = -1, inf, None
        while low + 1 < high:
            size = int(min(max(size, low + 1), high - 1))
            sample = self.draft(Random(rng_seed), size, length)
            tokens = count_tokens(tokenizer, sample.prompt) + self.max_new_tokens
            if tokens > length:
                high = size
                size -= ceil((tokens - length) / slope)
            else:
                found = size, tokens, sample
                if tokens >= FULL * length:
                    break
                low = size
                size += int((AIM * length - tokens) / slope)
        return found


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a prompt: of the text, and one more where the tokenizer has a BOS."""
    return len(document_ids(tokenizer, text))
