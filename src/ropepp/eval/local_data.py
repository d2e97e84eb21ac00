"""Which file of ``--data`` each benchmark reads, what it holds, and where it is published.

A file is ``FOLDER/SPLIT.jsonl``, a JSON object a line with the columns of the data set's own.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ropepp.errors import InputError


class BenchmarkFile(NamedTuple):
    """A benchmark's data.

    Attributes:
        folder: Below ``--data``.
        split: Name of the file, and of the split where it is published.
        columns: What each line must have.
        path: Name on the hub.
        name: Its configuration there, or None.
    """

    folder: str
    split: str
    columns: tuple[str, ...]
    path: str
    name: str | None = None

    def file(self, data: Path) -> Path:
        """Where it lies."""
        return data / self.folder / f"{self.split}.jsonl"

    def check(self, data: Path) -> Path:
        """The file, once its first line was looked at.

        Raises:
            InputError: It is missing, or lacks a column.
        """
        path = self.file(data)
        if not path.is_file():
            raise InputError(
                f"{path} is missing ({', '.join(self.columns)} a line; scripts/fetch_eval_data.py "
                "fetches it)"
            )
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        try:
            row = json.loads(line)
            absent = [column for column in self.columns if column not in row]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, line 1 is no JSON object: {error}") from error
        if absent:
            raise InputError(f"{path}, line 1 has no {', '.join(absent)}; needed: {self.columns}")
        return path


class HarnessTask(NamedTuple):
    """A task of lm-eval: its YAML below ``lm_eval/tasks``, its data, and the group of the paper's
    average that it belongs to."""

    yaml: str
    source: BenchmarkFile
    group: str


def _file(place: str, columns: str, path: str, name: str | None = None) -> BenchmarkFile:
    folder, _, split = place.rpartition("/")
    return BenchmarkFile(folder, split, tuple(columns.split(", ")), path, name)


def _glue(name: str, columns: str, published: str | None = None) -> HarnessTask:
    source = _file(f"super_glue/{name}/validation", columns, "aps/super_glue", published or name)
    return HarnessTask(f"super_glue/{name}/default.yaml", source, "super-glue-lm-eval-v1")


_TRUTHFUL = _file(
    "truthfulqa/validation",
    "question, mc1_targets, mc2_targets",
    "truthfulqa/truthful_qa",
    "multiple_choice",
)
_WRONG = "Incorrect Answer 1, Incorrect Answer 2, Incorrect Answer 3"

TEXTS = {
    "wikitext": _file("wikitext/validation", "text", "Salesforce/wikitext", "wikitext-2-raw-v1"),
    "lambada": _file("lambada/test", "text", "EleutherAI/lambada_openai", "default"),
}

# Of the nine groups of the paper's average, those of one task: YAML and file.
_ALONE = {
    "piqa": (
        "piqa/piqa.yaml",
        _file("piqa/validation", "goal, sol1, sol2, label", "baber/piqa"),
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        _file(
            "hellaswag/validation",
            "activity_label, ctx_a, ctx_b, endings, label",
            "Rowan/hellaswag",
        ),
    ),
    "winogrande": (
        "winogrande/default.yaml",
        _file(
            "winogrande/validation",
            "sentence, option1, option2, answer",
            "allenai/winogrande",
            "winogrande_xl",
        ),
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        _file("arc_easy/test", "question, choices, answerKey", "allenai/ai2_arc", "ARC-Easy"),
    ),
    "gpqa_main_zeroshot": (
        "gpqa/zeroshot/gpqa_main_zeroshot.yaml",
        _file("gpqa/train", f"Question, Correct Answer, {_WRONG}", "Idavidrein/gpqa", "gpqa_main"),
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        _file(
            "social_iqa/validation",
            "context, question, answerA, answerB, answerC, label",
            "lighteval/siqa",
        ),
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        _file("openbookqa/test", "question_stem, choices, answerKey", "allenai/openbookqa", "main"),
    ),
}

TASKS = {
    "truthfulqa_mc1": HarnessTask("truthfulqa/truthfulqa_mc1.yaml", _TRUTHFUL, "truthfulqa"),
    "truthfulqa_mc2": HarnessTask("truthfulqa/truthfulqa_mc2.yaml", _TRUTHFUL, "truthfulqa"),
    **{name: HarnessTask(yaml, file, name) for name, (yaml, file) in _ALONE.items()},
    "boolq": _glue("boolq", "passage, question, label"),
    "cb": _glue("cb", "premise, hypothesis, label"),
    "copa": _glue("copa", "premise, question, choice1, choice2, label"),
    "multirc": _glue("multirc", "paragraph, question, answer, label"),
    "record": _glue("record", "passage, query, entities, answers"),
    "sglue_rte": _glue("rte", "premise, hypothesis, label"),
    "wic": _glue("wic", "sentence1, sentence2, start1, end1, label"),
    "wsc": _glue("wsc", "text, span1_text, span2_index, span2_text, label", "wsc.fixed"),
}

# The nine groups of the paper's average, which are the harness' own but for TruthfulQA.
GROUPS = {
    group: [name for name, task in TASKS.items() if task.group == group]
    for group in dict.fromkeys(task.group for task in TASKS.values())
}
