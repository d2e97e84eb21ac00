"""The paper's protocol for RULER and BABILong: what OpenCompass 0.4.2 makes of their prompts.

OpenCompass puts a line end between the turns of a conversation, and its configurations of both end
the answer's turn with another one, which stays where the answer is left out. So a base model reads
two line ends behind every prompt. It writes 64 tokens whatever the task, as the paper has set. Its
RULER is an edition of its own, see `ropepp.eval.ruler.base`; an answer of BABILong is right where
its first sentence holds the target.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ropepp.data.tokenizer import Tokenizer
from ropepp.eval.babilong import babilong_tasks
from ropepp.eval.ruler import ruler_tasks
from ropepp.eval.ruler.base import CURRENT, OPENCOMPASS
from ropepp.eval.tasks import Sample, Task


class AsInPaper(Task):
    """A task as the paper has run it."""

    max_new_tokens = 64

    def __init__(self, task: Task) -> None:
        self.task, self.suite = task, f"{task.suite}, paper"
        self.name, self.official, self.baseline = task.name, task.official, task.baseline

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        samples = self.task.samples(tokenizer, length, count, seed)
        return [replace(sample, prompt=sample.prompt + "\n\n") for sample in samples]

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        scores = self.task.score(output, sample)
        return {"score": scores.get("simple", scores["score"])}


def tasks_of(suite: str, data: Path | None, protocol: str) -> Sequence[Task]:
    """The tasks of "ruler" or "babilong" by one of `ropepp.eval.PROTOCOLS`, of the folder of all
    benchmarks' files, if any; errors as of `ruler_tasks` and `babilong_tasks`."""
    folder = data / suite if data and (data / suite).is_dir() else None
    paper = protocol == "paper"
    tasks: Sequence[Task]
    if suite == "babilong":
        tasks = babilong_tasks(folder)
    else:
        tasks = ruler_tasks(folder, OPENCOMPASS if paper else CURRENT)
    return [AsInPaper(task) for task in tasks] if paper else tasks
