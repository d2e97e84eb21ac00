"""What a long-context task is, and how its prompt is made as long as asked, in the model's tokens.

A sample is drawn from (seed, task, index) alone: the same whatever the number of samples.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError

FULL = 0.985  # share of the length at which a prompt is long enough


@dataclass(frozen=True)
class Sample:
    """A prompt and what a right answer holds."""

    prompt: str  # which the answer follows directly
    answers: tuple[str, ...]
    question: str = ""  # where the score depends on it


class Task(ABC):
    """A task of a suite."""

    suite: str  # "ruler" or "babilong", with the protocol unless it is the official one
    name: str  # "niah_single_1", "qa1", ...
    max_new_tokens: int  # that the model may answer
    official: bool  # False where a background or data stands in for the original's
    baseline: float  # score of the best constant answer, 0 to 1

    @abstractmethod
    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        """Samples 0 to `count - 1` of a seed, each of at most `length` tokens, answer included; an
        `InputError` if the task does not fit into the length."""

    def too_short(self, length: int) -> InputError:
        """Says that no sample fits into so many tokens."""
        needs = f"{self.suite} {self.name} needs more, counted with this tokenizer"
        return InputError(f"length is {length}; {needs}")

    @abstractmethod
    def score(self, output: str, sample: Sample) -> dict[str, float]:
        """Scores of a model's output, each 0 to 1; "score" comes first."""
