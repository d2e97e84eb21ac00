"""Which file of ``--data`` each benchmark reads, what it holds, and where it is published.

A file is ``FOLDER/SPLIT.jsonl``, a JSON object a line with the columns of the data set's own.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ropepp.errors import InputError


class Source(NamedTuple):
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
    """A task of lm-eval: its YAML below ``lm_eval/tasks`` and its data."""

    yaml: str
    source: Source


def _glue(name: str, *columns: str) -> Source:
    folder = f"super_glue/{name.removesuffix('.fixed')}"
    return Source(folder, "validation", (*columns, "label"), "aps/super_glue", name)


_TRUTHFUL = Source(
    "truthfulqa",
    "validation",
    ("question", "mc1_targets", "mc2_targets"),
    "truthfulqa/truthful_qa",
    "multiple_choice",
)
_GPQA = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_SIQA = ("context", "question", "answerA", "answerB", "answerC", "label")
_RECORD = Source(
    "super_glue/record",
    "validation",
    ("passage", "query", "entities", "answers"),
    "aps/super_glue",
    "record",
)

TEXTS = {
    "wikitext": Source(
        "wikitext", "validation", ("text",), "Salesforce/wikitext", "wikitext-2-raw-v1"
    ),
    "lambada": Source("lambada", "test", ("text",), "EleutherAI/lambada_openai", "default"),
}

TASKS = {
    "truthfulqa_mc1": HarnessTask("truthfulqa/truthfulqa_mc1.yaml", _TRUTHFUL),
    "truthfulqa_mc2": HarnessTask("truthfulqa/truthfulqa_mc2.yaml", _TRUTHFUL),
    "piqa": HarnessTask(
        "piqa/piqa.yaml",
        Source("piqa", "validation", ("goal", "sol1", "sol2", "label"), "baber/piqa"),
    ),
    "hellaswag": HarnessTask(
        "hellaswag/hellaswag.yaml",
        Source("hellaswag", "validation", _HELLASWAG, "Rowan/hellaswag"),
    ),
    "winogrande": HarnessTask(
        "winogrande/default.yaml",
        Source(
            "winogrande",
            "validation",
            ("sentence", "option1", "option2", "answer"),
            "allenai/winogrande",
            "winogrande_xl",
        ),
    ),
    "arc_easy": HarnessTask(
        "arc/arc_easy.yaml",
        Source(
            "arc_easy", "test", ("question", "choices", "answerKey"), "allenai/ai2_arc", "ARC-Easy"
        ),
    ),
    "gpqa_main_zeroshot": HarnessTask(
        "gpqa/zeroshot/gpqa_main_zeroshot.yaml",
        Source("gpqa", "train", _GPQA, "Idavidrein/gpqa", "gpqa_main"),
    ),
    "social_iqa": HarnessTask(
        "siqa/siqa.yaml", Source("social_iqa", "validation", _SIQA, "lighteval/siqa")
    ),
    "openbookqa": HarnessTask(
        "openbookqa/openbookqa.yaml",
        Source(
            "openbookqa",
            "test",
            ("question_stem", "choices", "answerKey"),
            "allenai/openbookqa",
            "main",
        ),
    ),
    "boolq": HarnessTask("super_glue/boolq/default.yaml", _glue("boolq", "passage", "question")),
    "cb": HarnessTask("super_glue/cb/default.yaml", _glue("cb", "premise", "hypothesis")),
    "copa": HarnessTask(
        "super_glue/copa/default.yaml", _glue("copa", "premise", "question", "choice1", "choice2")
    ),
    "multirc": HarnessTask(
        "super_glue/multirc/default.yaml", _glue("multirc", "paragraph", "question", "answer")
    ),
    "record": HarnessTask("super_glue/record/default.yaml", _RECORD),
    "sglue_rte": HarnessTask("super_glue/rte/default.yaml", _glue("rte", "premise", "hypothesis")),
    "wic": HarnessTask(
        "super_glue/wic/default.yaml",
        _glue("wic", "sentence1", "sentence2", "start1", "end1"),
    ),
    "wsc": HarnessTask(
        "super_glue/wsc/default.yaml",
        _glue("wsc.fixed", "text", "span1_text", "span2_index", "span2_text"),
    ),
}

SUPER_GLUE = ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc")

# The nine groups of the paper's average, which are the harness' own but for TruthfulQA.
GROUPS = {
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
    **{
        name: (name,)
        for name in (
            "piqa", "hellaswag", "winogrande", "arc_easy", "gpqa_main_zeroshot", "social_iqa",
            "openbookqa",
        )
    },
    "super-glue-lm-eval-v1": SUPER_GLUE,
}  # fmt: skip
