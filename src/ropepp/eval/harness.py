"""The short-context benchmarks, run by lm-eval on local files."""

import importlib
import json
import logging
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml  # type: ignore[import-untyped]

from ropepp.errors import InputError, optional
from ropepp.eval.evaluated_model import EvaluatedModel, digest
from ropepp.eval.local_data import GROUPS, TASKS
from ropepp.eval.scores import Score, average, mean_of
from ropepp.files import write_text

SQUAD = "transformers.data.metrics.squad_metrics"
SEED = 0  # lm-eval's own; it orders GPQA's choices
ROWS = "rows.jsonl"
LONGEST = 1 << 30  # tokens of a context, which is never cut
USUAL = 512  # tokens of a question with its context, at most, by which batches are sized
METRICS = ("acc", "acc_norm", "f1", "em")


def require_harness() -> None:
    """Raises an `InputError` that names the extra if lm-eval or what it needs is missing."""
    for module in ("lm_eval.evaluator", "transformers"):
        optional(module, "eval", "the suite short")


def evaluate_harness(
    subject: EvaluatedModel, name: str, data: Path, limit: int | None = None
) -> list[Score]:
    """Runs a task of `ropepp.eval.local_data.TASKS`, without examples in the prompt: a row for each
    of accuracy, accuracy normalised by the length of the choices, F1 and exact match that lm-eval
    computes a question at a time, over the first ``limit`` questions. An `InputError` if the task's
    file is missing or damaged."""
    rows = TASKS[name].rows(data)
    # A task is measured as a whole: an evaluation that was killed goes on with the next one.
    (found,) = subject.measure(
        name, None, [digest(rows, limit)], [[0]],
        lambda _: [run_harness(harness_model(subject), name, data, limit)],
    )  # fmt: skip
    return [
        Score(subject.name, "short", name, None, metric, *mean_of(values), len(values))
        for metric, values in found.items()
    ]


def harness_model(subject: EvaluatedModel) -> Any:
    """lm-eval's own model over ours as transformers sees it, by which no context is cut."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer
    from transformers import logging as transformers_logging

    from ropepp.interop.hf import wrapped
    from ropepp.interop.text import write_tokenizer

    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(subject.tokenizer, Path(folder), LONGEST)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(
        wrapped(subject.model, LONGEST),
        tokenizer=tokenizer,
        max_length=LONGEST,
        batch_size=max(1, subject.batch_tokens // USUAL),
    )


def run_harness(lm: Any, name: str, data: Path, limit: int | None = None) -> dict[str, list[float]]:
    """Scores of each question by metric; ``lm`` is any model object of lm-eval."""
    import datasets  # type: ignore[import-untyped]
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    provide_squad_metrics()
    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(json.dumps(row) + "\n" for row in TASKS[name].rows(data))
        write_text(Path(folder) / ROWS, lines)
        write_text(Path(folder) / f"{name}.yaml", task_yaml(name, Path(folder)))
        manager = TaskManager(include_path=folder, include_defaults=False)
        # GPQA shuffles its choices with the global generator, while its documents are read.
        random.seed(SEED)
        tasks = None
        try:
            tasks = manager.load([name])
            results = evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
        except InputError:
            raise
        except Exception as error:  # while it reads, the libraries raise of all kinds
            of_rows = ValueError, LookupError, TypeError, AttributeError
            if tasks is not None and not isinstance(error, of_rows):
                raise
            reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
            file = TASKS[name].file(data)
            raise InputError(f"{file} cannot be read by lm-eval: {reason}") from error
    samples = results["samples"][name]
    return {
        metric: [float(sample[metric]) for sample in samples]
        for metric in METRICS
        if metric in samples[0] and not isinstance(samples[0][metric], tuple)
    }


def task_yaml(name: str, folder: Path) -> str:
    """A task that includes lm-eval's own and reads the rows in a folder instead, where it also has
    its cache: names of files are patterns to the library of datasets, and its own cache may not be
    writable."""
    import lm_eval.tasks

    task = TASKS[name]
    files = {"data_files": {task.split: [str(folder / ROWS)]}, "cache_dir": str(folder / "cache")}
    content = {
        "include": str(Path(lm_eval.tasks.__file__).parent / task.yaml),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": files,
        "training_split": None,
        "validation_split": None if task.split == "test" else task.split,
        "test_split": "test" if task.split == "test" else None,
        "num_fewshot": 0,
    }
    return yaml.safe_dump(content)


def summarize(rows: Sequence[Score]) -> list[Score]:
    """Groups of several tasks and the average over the nine groups, of those that are complete.

    A task's number is its accuracy, ReCoRD's its F1; a group's is the mean of its tasks', and the
    last row's the mean of the groups'.
    """
    main: dict[str, Score] = {}
    for row in rows:
        main.setdefault(row.task, row)  # the first metric
    groups = {
        group: average([main[task] for task in tasks], group, "acc")
        for group, tasks in GROUPS.items()
        if all(task in main for task in tasks)
    }
    out = [row for group, row in groups.items() if len(GROUPS[group]) > 1]
    if len(groups) == len(GROUPS):
        out.append(average(list(groups.values()), f"average of {len(GROUPS)}"))
    return out


def squad_score(kind: str, expected: str, found: str) -> float:
    """By the rules of SQuAD, 0 to 1; ``kind`` is "exact_match" or "f1"."""
    from torchmetrics.functional.text import squad

    target: dict[str, Any] = {"answers": {"answer_start": [0], "text": [expected]}, "id": ""}
    return float(squad({"prediction_text": found, "id": ""}, target)[kind]) / 100


def provide_squad_metrics() -> None:
    """Lets lm-eval import the rules of SQuAD (arXiv 1606.05250), which it takes for ReCoRD from a
    module that newer versions of transformers lack."""
    try:
        importlib.import_module(SQUAD)
    except ModuleNotFoundError:
        import transformers.data

        metrics, module = ModuleType(SQUAD.rpartition(".")[0]), ModuleType(SQUAD)
        exact, f1 = (partial(squad_score, kind) for kind in ("exact_match", "f1"))
        vars(module).update(compute_exact=exact, compute_f1=f1)
        vars(metrics)["squad_metrics"] = module
        vars(transformers.data)["metrics"] = metrics
        sys.modules |= {metrics.__name__: metrics, SQUAD: module}
