"""``ropepp evaluate``: models and benchmarks in, one table out; see docs/evaluate.md."""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.eval.evaluated_model import EvaluatedModel, ResultCache, identify
from ropepp.eval.local_data import TASKS, TEXTS
from ropepp.eval.perplexity import Text, evaluate_text, read_text
from ropepp.eval.scores import Score, markdown, to_csv
from ropepp.eval.tasks import Task
from ropepp.files import write_json, write_text
from ropepp.interop.saved import SavedModel, open_model

SUITES = ("perplexity", "short", "ruler", "babilong")
GENERATED = ("ruler", "babilong")
ITEMS = "items.jsonl"


@dataclass
class Plan:
    """What there is to run, and why some of what was asked for is left out."""

    texts: list[Text] = field(default_factory=list)
    harness: list[str] = field(default_factory=list)
    generated: list[Task] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def run(options: Namespace) -> None:
    """The command; see ``ropepp evaluate --help``.

    Raises:
        InputError: An option, a model or all of the data is not as it must be.
    """
    _check(options)
    plan = make_plan(options)
    for what, reason in plan.left_out.items():
        print(f"left out: {what}: {reason}", file=sys.stderr)
    if not (plan.texts or plan.harness or plan.generated):
        raise InputError("nothing is left to evaluate: give --data DIR or --text FILE")
    if len(options.models) > 1:  # a broken one must not show up after hours
        for path in options.models:
            open_model(path).tokenizer(options.tokenizer)
    rows: list[Score] = []
    models: dict[str, dict[str, Any]] = {}
    curves: list[dict[str, Any]] = []
    for path in options.models:
        subject = _open(path, options, set(models))
        models[subject.name] = _describe(subject)
        own, own_curves = evaluate(subject, plan, options)
        rows += own
        curves += own_curves
        _to_tensorboard(subject.saved, own, own_curves)
        write_report(options, plan, models, rows, curves)
    print((options.out / "evaluation.md").read_text(), end="")


def make_plan(options: Namespace) -> Plan:
    """Looks at all data before anything runs; what is missing is left out with a reason."""
    plan = Plan()
    suites = SUITES if "all" in options.suite else options.suite
    data = options.data

    def attempt(what: str, do: Callable[[], None]) -> None:
        try:
            do()
        except InputError as error:
            plan.left_out[what] = str(error)

    if "perplexity" in suites:
        plan.texts += [read_text(path) for path in options.text]
        for name, source in TEXTS.items() if data or not options.text else ():
            file = source.file(_given(data))
            attempt(name, lambda f=file, n=name: plan.texts.append(read_text(f, n)))  # type: ignore[misc]
    if "short" in suites:
        from ropepp.eval.harness import require_harness

        attempt("short", require_harness)
        for name, task in TASKS.items() if "short" not in plan.left_out else ():

            def check(name: str = name, task: Any = task) -> None:
                task.source.check(_given(data))
                plan.harness.append(name)

            attempt(name, check)
    for suite in GENERATED:
        if suite in suites:
            attempt(suite, lambda s=suite: plan.generated.extend(_tasks(s, data)))  # type: ignore[misc]
    if options.tasks:
        _choose(plan, options.tasks)
    return plan


def evaluate(
    subject: EvaluatedModel, plan: Plan, options: Namespace
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Runs a plan on a model: its rows, and its losses by position."""
    from ropepp.eval.generated import averages, evaluate_task
    from ropepp.eval.harness import evaluate_harness, summarize

    rows: list[Score] = []
    curves = []
    for text in plan.texts:
        for length in options.lengths:
            stride = options.stride or max(1, length // 8)
            found = evaluate_text(subject, text, length, stride)
            rows += found.rows
            curves.append(
                {"model": subject.name, "text": text.name, "length": length} | found.by_position
            )
    short = [
        row
        for name in plan.harness
        for row in evaluate_harness(subject, name, options.data, options.samples)
    ]
    rows += short + summarize(short)
    for suite in GENERATED:
        own: list[Score] = []
        for task in (task for task in plan.generated if task.suite == suite):
            for length in options.lengths:
                count = options.samples or 100
                try:
                    own += evaluate_task(subject, task, length, count, options.seed)
                except InputError as error:  # such as a length that is too short for it
                    plan.left_out[f"{suite} {task.name} {length}"] = str(error)
        rows += own + averages(own)
    return rows, curves


def write_report(
    options: Namespace,
    plan: Plan,
    models: dict[str, dict[str, Any]],
    rows: list[Score],
    curves: list[dict[str, Any]],
) -> None:
    """Writes evaluation.md, .csv and .json."""
    from ropepp.runs.machine import provenance

    if not rows:
        raise InputError("; ".join(f"{what}: {why}" for what, why in plan.left_out.items()))
    names = ("lengths", "samples", "stride", "seed", "dtype", "device", "batch_tokens")
    settings = {name: getattr(options, name) for name in names}
    notes = [
        "± is one standard error over items (windows of a text, questions, samples); shares are in "
        "percent, perplexities and nats as they are.",
        *(f"{name}: {facts['path']}, step {facts['step']}" for name, facts in models.items()),
        *(f"left out: {what}: {reason}" for what, reason in plan.left_out.items()),
        ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None),
    ]
    write_text(options.out / "evaluation.md", markdown(rows, notes))
    write_text(options.out / "evaluation.csv", to_csv([asdict(row) for row in rows]))
    content = {
        "settings": settings,
        "versions": provenance(),
        "models": models,
        "left_out": plan.left_out,
        "results": [asdict(row) for row in rows],
        "loss_by_position": curves,
    }
    write_json(options.out / "evaluation.json", content)


def _open(path: str, options: Namespace, taken: set[str]) -> EvaluatedModel:
    import torch

    dtype = getattr(torch, options.dtype)
    saved = open_model(path, dtype, options.device)
    name = saved.name if saved.name not in taken else str(path)
    return EvaluatedModel(
        name=name,
        saved=saved,
        tokenizer=saved.tokenizer(options.tokenizer),
        results=ResultCache(options.out / ITEMS),
        batch_tokens=options.batch_tokens,
        identity=identify(saved, dtype, torch.device(options.device)),
    )


def _describe(subject: EvaluatedModel) -> dict[str, Any]:
    from ropepp.model.flops import num_parameters

    return {
        "path": str(subject.saved.path),
        "step": subject.saved.step,
        "variant": type(subject.model.position).__name__,
        "parameters": num_parameters(subject.model),
        "tokenizer": subject.tokenizer.fingerprint,
        "identity": subject.identity,
    }


def _to_tensorboard(saved: SavedModel, rows: list[Score], curves: list[dict[str, Any]]) -> None:
    """Scalars at the model's step into its run's folder; loss by position at the position."""
    if saved.run is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(saved.run)) as writer:
        for row in rows:
            task = row.task + (f" {row.length}" if row.length else "")
            tag = f"evaluation_{row.suite}/{task}/{row.metric}".replace(" ", "_").replace(",", "")
            writer.add_scalar(tag, row.value, saved.step)
        for curve in curves:
            tag = f"loss_by_position/{curve['text']}_{curve['length']}"
            for position, loss in zip(curve["position"], curve["loss"], strict=True):
                writer.add_scalar(tag, loss, round(position))


def _given(data: Path | None) -> Path:
    if data is None:
        raise InputError("its data is not here: give --data DIR")
    return data


def _tasks(suite: str, data: Path | None) -> list[Task]:
    folder = data / suite if data and (data / suite).is_dir() else None
    if suite == "ruler":
        from ropepp.eval.ruler import ruler_tasks

        return ruler_tasks(folder)
    from ropepp.eval.babilong import babilong_tasks

    return babilong_tasks(folder)


def _choose(plan: Plan, wanted: list[str]) -> None:
    known = {text.name for text in plan.texts} | set(plan.harness)
    known |= {task.name for task in plan.generated}
    if unknown := set(wanted) - known - set(plan.left_out):
        raise InputError(f"--tasks has {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    plan.texts = [text for text in plan.texts if text.name in wanted]
    plan.harness = [name for name in plan.harness if name in wanted]
    plan.generated = [task for task in plan.generated if task.name in wanted]
    plan.left_out = {what: why for what, why in plan.left_out.items() if what in wanted}


def _check(options: Namespace) -> None:
    """Completes options and refuses what cannot be."""
    import torch

    for path in options.models:
        if not Path(path).exists():
            raise InputError(f"model {path} does not exist")
    if options.data is not None and not options.data.is_dir():
        raise InputError(f"--data is {options.data}; it must be a folder")
    smallest = min(options.lengths)
    if smallest < 2 or (options.stride is not None and not 1 <= options.stride < smallest):
        raise InputError(
            f"--lengths is {options.lengths}, --stride {options.stride}; lengths must be at least "
            "2, the stride from 1 to less than each of them"
        )
    cuda = torch.cuda.is_available()
    options.device = options.device or ("cuda" if cuda else "cpu")
    if options.device.startswith("cuda") and not cuda:
        raise InputError(f"--device is {options.device}; there is no CUDA device here")
    on_gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.batch_tokens = options.batch_tokens or (65_536 if on_gpu else 8_192)
