"""Runs tasks whose samples are generated: RULER, BABILong, or any `ropepp.eval.tasks.Task`; by the
benchmarks' own protocol, or as the paper has run them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ropepp.data.tokenizer import Tokenizer, decode_behind, encode_behind
from ropepp.eval.babilong import babilong_tasks
from ropepp.eval.evaluated_model import EvaluatedModel, by_length, digest
from ropepp.eval.likelihood import continue_cached
from ropepp.eval.ruler import ruler_tasks
from ropepp.eval.ruler.base import CURRENT, OPENCOMPASS
from ropepp.eval.scores import NLL, Score, average, mean_of, ratio_of
from ropepp.eval.tasks import Sample, Task
from ropepp.generate.decode import complete
from ropepp.generate.text import prompt_ids
from ropepp.model.cache import KVCache


class EncodedSample(NamedTuple):
    """A sample in tokens; before an answer stands a space unless the prompt ends with one."""

    sample: Sample
    prompt: list[int]  # BOS included
    answers: list[list[int]]  # each expected string
    room: int  # tokens of the prompt and the longest answer that is read or written


def encoded_samples(
    task: Task, tokenizer: Tokenizer, length: int, count: int, seed: int
) -> list[EncodedSample]:
    """The samples of a task in tokens; arguments and errors as in `Task.samples`."""
    found = []
    for sample in task.samples(tokenizer, length, count, seed):
        prompt = prompt_ids(tokenizer, sample.prompt)
        gap = "" if sample.prompt[-1:].isspace() else " "
        wanted = [gap + answer for answer in sample.answers]
        answers = encode_behind(tokenizer, wanted, sample.prompt)
        room = len(prompt) + max(task.max_new_tokens, *map(len, answers), 1)
        found.append(EncodedSample(sample, prompt, answers, room))
    return found


def evaluate_task(
    subject: EvaluatedModel, task: Task, length: int, count: int, seed: int
) -> list[Score]:
    """Scores a model's greedy answers; and the negative log-likelihood of each expected string
    behind the prompt, summed over strings and divided by their tokens, which tells small models
    apart whose answers are all wrong. An `InputError` if the task cannot be made at this length."""
    model, tokenizer = subject.model, subject.tokenizer
    samples = encoded_samples(task, tokenizer, length, count, seed)
    contents = [digest(one.prompt, one.answers, task.max_new_tokens) for one in samples]
    batches = by_length([one.room for one in samples], subject.batch_tokens)

    def run(batch: list[int]) -> list[dict[str, Any]]:
        """Outputs and summed losses of the expected answers; prompts are read once."""
        some = [samples[i] for i in batch]
        prompts = [one.prompt for one in some]
        cache = KVCache(len(model.layers), max(one.room for one in some))
        outputs = complete(model, prompts, task.max_new_tokens, tokenizer.eot_id, cache)
        cache.crop(max(map(len, prompts)) - 1)
        answers = [one.answers for one in some]
        scored = continue_cached(model, cache, prompts, answers, subject.batch_tokens)
        return [
            {"output": decode_behind(tokenizer, prompt, output), "nll": sum(own)}
            for prompt, output, own in zip(prompts, outputs, scored, strict=True)
        ]

    values = subject.measure(f"{task.suite} {task.name}", length, contents, batches, run)
    scores = [
        task.score(value["output"], one.sample) for value, one in zip(values, samples, strict=True)
    ]
    numbers = {name: mean_of([score[name] for score in scores]) for name in scores[0]}
    tokens = [sum(map(len, one.answers)) for one in samples]
    numbers[NLL] = ratio_of([value["nll"] for value in values], tokens)
    return [
        Score(
            subject.name, task.suite, task.name, length, metric, *both, len(samples),
            task.baseline if metric == "score" else None, task.official,
        )
        for metric, both in numbers.items()
    ]  # fmt: skip


def averages(rows: Sequence[Score]) -> list[Score]:
    """Means over the tasks of each length, of every metric that all of them have."""
    out = []
    for length, metric in dict.fromkeys((row.length, row.metric) for row in rows):
        own = [row for row in rows if (row.length, row.metric) == (length, metric)]
        tasks = {row.task for row in rows if row.length == length}
        if len(own) == len(tasks) > 1:
            out.append(average(own, f"average of {len(own)}"))
    return out


class AsInPaper(Task):
    """A task as the paper has run it: what OpenCompass 0.4.2 makes of its prompt.

    OpenCompass puts a line end between the turns of a conversation, and its configurations of RULER
    and BABILong end the answer's turn with another one, which stays where the answer is left out.
    So a base model reads two line ends behind every prompt. It writes 64 tokens whatever the task.
    RULER is an edition of its own, see `ropepp.eval.ruler.base`; an answer of BABILong is right
    where its first sentence holds the target.
    """

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
