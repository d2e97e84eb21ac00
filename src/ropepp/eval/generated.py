"""Runs tasks whose samples are generated: RULER, BABILong, or any `ropepp.eval.tasks.Task`."""

from collections.abc import Sequence
from typing import Any

from ropepp.eval.likelihood import continue_cached
from ropepp.eval.scores import NLL, Row, average, mean_of, ratio_of
from ropepp.eval.subject import Item, Subject, by_length, digest
from ropepp.eval.tasks import Sample, Task
from ropepp.generate.decode import generate, pad_left
from ropepp.generate.text import prompt_ids
from ropepp.model.cache import KVCache


def evaluate_task(subject: Subject, task: Task, length: int, count: int, seed: int) -> list[Row]:
    """Scores a model's greedy answers, and how likely it finds the expected ones.

    The negative log-likelihood is that of each expected string behind the prompt (a space between
    unless the prompt ends with one), summed over strings and divided by their tokens. It tells
    small models apart whose answers are all wrong.

    Args:
        subject: The model.
        task: The task.
        length: Tokens of prompt and answer.
        count: Number of samples.
        seed: Seed of the samples.

    Raises:
        InputError: The task cannot be made at this length.
    """
    samples = task.samples(subject.tokenizer, length, count, seed)
    prompts = [prompt_ids(subject.tokenizer, sample.prompt) for sample in samples]
    answers = [_answer_ids(subject, sample) for sample in samples]
    room = [
        len(prompt) + max(task.max_new_tokens, *map(len, own), 1)
        for prompt, own in zip(prompts, answers, strict=True)
    ]
    items = [
        Item(digest(prompt, own, task.max_new_tokens), tokens)
        for prompt, own, tokens in zip(prompts, answers, room, strict=True)
    ]

    def run(batch: list[int]) -> list[dict[str, Any]]:
        outputs, nll = _answer(
            subject,
            [prompts[i] for i in batch],
            [answers[i] for i in batch],
            max(room[i] for i in batch),
            task.max_new_tokens,
        )
        return [{"output": text, "nll": x} for text, x in zip(outputs, nll, strict=True)]

    batches = by_length(room, subject.batch_tokens)
    values = subject.measure(f"{task.suite} {task.name}", length, items, batches, run)
    scores = [task.score(value["output"], s) for value, s in zip(values, samples, strict=True)]
    tokens = [sum(map(len, own)) for own in answers]

    def row(metric: str, numbers: tuple[float, float | None], baseline: float | None) -> Row:
        return Row(
            subject.name, task.suite, task.name, length, metric, *numbers, len(samples), baseline,
            task.official,
        )  # fmt: skip

    rows = [
        row(name, mean_of([score[name] for score in scores]), task.baseline if not i else None)
        for i, name in enumerate(scores[0])
    ]
    return [*rows, row(NLL, ratio_of([value["nll"] for value in values], tokens), None)]


def averages(rows: Sequence[Row]) -> list[Row]:
    """Means over the tasks of each length, of every metric that all of them have."""
    out = []
    for length, metric in dict.fromkeys((row.length, row.metric) for row in rows):
        own = [row for row in rows if (row.length, row.metric) == (length, metric)]
        tasks = {row.task for row in rows if row.length == length}
        if len(own) == len(tasks) > 1:
            out.append(average(own, f"average of {len(own)}"))
    return out


def _answer_ids(subject: Subject, sample: Sample) -> list[list[int]]:
    gap = "" if sample.prompt[-1:].isspace() else " "
    return subject.tokenizer.encode_batch([gap + answer for answer in sample.answers])


def _answer(
    subject: Subject,
    prompts: list[list[int]],
    answers: list[list[list[int]]],
    room: int,
    max_new_tokens: int,
) -> tuple[list[str], list[float]]:
    """Outputs of a batch and summed losses of its expected answers; prompts are read once."""
    model, end = subject.model, subject.tokenizer.eot_id
    device = model.embed_tokens.weight.device
    ids, documents = pad_left(prompts)
    cache = KVCache(len(model.layers), room)
    found = generate(
        model,
        ids.to(device),
        max_new_tokens,
        document_ids=None if documents is None else documents.to(device),
        stop_ids=(end,),
        cache=cache,
    )
    new = [
        row[: row.index(end)] if end in row else row for row in found[:, ids.shape[1] :].tolist()
    ]
    cache.crop(ids.shape[1] - 1)
    scored = continue_cached(model, cache, prompts, answers, subject.batch_tokens)
    return [subject.tokenizer.decode(row) for row in new], [
        sum(one.nll for one in own) for own in scored
    ]
