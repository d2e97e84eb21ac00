"""``ropepp evaluate``: models and benchmarks in, one table out; see docs/evaluate.md."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ropepp.errors import InputError
from ropepp.eval import SUITES
from ropepp.eval.evaluated_model import EvaluatedModel, ResultCache, identify
from ropepp.eval.generated import averages, evaluate_task, tasks_of
from ropepp.eval.harness import evaluate_harness, require_harness, summarize
from ropepp.eval.local_data import TASKS, TEXTS
from ropepp.eval.perplexity import Text, evaluate_text, read_text
from ropepp.eval.report import TABLES, Report
from ropepp.eval.scores import Score
from ropepp.eval.tasks import Task
from ropepp.files import DiskError, held, printable, require_results, require_writable
from ropepp.interop.saved import SavedModel, open_model, placement
from ropepp.model.folders.hub import local_path
from ropepp.runs.events import EVENTS, write_events

GENERATED = ("ruler", "babilong")
ITEMS = "items.jsonl"


@dataclass
class Workload:
    """What there is to run, and why some of what was asked for is left out."""

    texts: list[Text] = field(default_factory=list)
    harness: list[str] = field(default_factory=list)
    generated: list[Task] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def leaving_out(self, what: str, aloud: bool = True) -> Iterator[None]:
        """Leaves it out where the block raises an `InputError`."""
        try:
            yield
        except InputError as error:
            self.left_out[what] = str(error)
            if aloud:
                print(f"left out: {what}: {error}", file=sys.stderr)

    def add_text(self, path: Path, name: str | None = None) -> None:
        """Adds a text, or leaves it out; names tell texts apart."""
        with self.leaving_out(name or printable(path.stem), aloud=False):
            text = read_text(path, name)
            if any(other.name == text.name for other in self.texts):
                text = text._replace(name=printable(path))
            self.texts.append(text)


def run(options: Namespace) -> None:
    """The command, see ``ropepp evaluate --help``; an `InputError` if not all is as it must be."""
    _check(options)
    work = find_work(options)
    for what, reason in work.left_out.items():
        print(f"left out: {what}: {reason}", file=sys.stderr)
    if not (work.texts or work.harness or work.generated):
        raise InputError("nothing is left to evaluate: give --data DIR or --text FILE")
    if len(options.models) > 1:  # a broken one must not show up after hours
        for path in options.models:
            open_model(path).tokenizer(options.tokenizer)
    report = Report(options, work.left_out)
    failed = None
    with ExitStack() as stack:
        cache = None
        for path in options.models:
            saved = open_model(path, getattr(torch, options.dtype), options.device)
            saved.require_finite()
            tokenizer = saved.tokenizer(options.tokenizer)
            if cache is None:
                stack.enter_context(held(options.out / ".evaluate.lock"))
                cache = ResultCache(options.out / ITEMS)
            name = saved.name if saved.name not in report.models else printable(path)
            subject = EvaluatedModel(
                name, saved, tokenizer, cache, options.batch_tokens, identify(saved)
            )
            found, curves = evaluate(subject, work, options)
            report.add(subject, found, curves)
            failed = report.write(complete=path == options.models[-1])
            try:
                _to_tensorboard(saved, found, curves)
            except DiskError as error:  # of somebody else's run, for instance; the tables are there
                print(error, file=sys.stderr)
    print(report.text(), end="")
    if failed is not None:
        raise failed


def find_work(options: Namespace) -> Workload:
    """Looks at all data before anything runs; what is missing is left out with a reason."""
    work = Workload()
    suites = SUITES if "all" in options.suite else options.suite
    data = options.data
    if "perplexity" in suites:
        for path in dict.fromkeys(options.text):
            work.add_text(path)
        for name, source in TEXTS.items() if data or not options.text else ():
            with work.leaving_out(name, aloud=False):
                work.add_text(source.file(_given(data)), name)
    if "short" in suites:
        with work.leaving_out("short", aloud=False):
            require_harness()
        for name, task in TASKS.items() if "short" not in work.left_out else ():
            with work.leaving_out(name, aloud=False):
                task.rows(_given(data))
                work.harness.append(name)
    for suite in GENERATED:
        if suite in suites:
            with work.leaving_out(suite, aloud=False):
                work.generated += tasks_of(suite, data, options.protocol)
    if wanted := options.tasks:
        known = {text.name for text in work.texts} | set(work.harness)
        known |= {task.name for task in work.generated}
        if unknown := set(wanted) - known - set(work.left_out):
            allowed = ", ".join(sorted(known))
            why = "".join(f"; {what} is left out: {x}" for what, x in work.left_out.items())
            raise InputError(f"--tasks has {', '.join(unknown)}; allowed: {allowed}{why}")
        work.texts = [text for text in work.texts if text.name in wanted]
        work.harness = [name for name in work.harness if name in wanted]
        work.generated = [task for task in work.generated if task.name in wanted]
        work.left_out = {what: why for what, why in work.left_out.items() if what in wanted}
    return work


def evaluate(
    subject: EvaluatedModel, work: Workload, options: Namespace
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Runs all on a model: its rows, and its losses by position."""
    rows: list[Score] = []
    curves = []
    for text in work.texts:
        for length in options.lengths:
            stride = options.stride or max(1, length // 8)
            with work.leaving_out(f"{text.name} {length}"):
                found, by_position = evaluate_text(subject, text, length, stride, work.leaving_out)
                rows += found
                curve = {"model": subject.name, "text": text.name, "length": length}
                curves.append(curve | by_position)
    short: list[Score] = []
    for name in work.harness:
        with work.leaving_out(name):
            short += evaluate_harness(subject, name, options.data, options.samples)
    rows += short + summarize(short)
    for suite in GENERATED:
        own: list[Score] = []
        for task in (task for task in work.generated if task.suite.startswith(suite)):
            for length in options.lengths:
                count = options.samples or 100
                # A length may be too short for it.
                with work.leaving_out(f"{task.suite} {task.name} {length}"):
                    own += evaluate_task(subject, task, length, count, options.seed)
        rows += own + averages(own)
    return rows, curves


def _to_tensorboard(saved: SavedModel, rows: list[Score], curves: list[dict[str, Any]]) -> None:
    """Scalars at the model's step into its run's folder; loss by position at the position."""
    if saved.run is None:
        return
    from torch.utils.tensorboard.summary import scalar

    found = []
    for row in rows:
        task = row.task + (f" {row.length}" if row.length else "")
        tag = f"evaluation_{row.suite}/{task}/{row.metric}".replace(" ", "_").replace(",", "")
        found.append((saved.step or 0, scalar(tag, row.value)))
    for curve in curves:
        tag = f"loss_by_position/{curve['text']}_{curve['length']}"
        for position, loss in zip(curve["position"], curve["loss"], strict=True):
            found.append((round(position), scalar(tag, loss)))
    write_events(saved.run / f"{EVENTS}{time.time():.9f}.evaluation", found)


def _given(data: Path | None) -> Path:
    if data is None:
        raise InputError("its data is not here: give --data DIR")
    return data


def _check(options: Namespace) -> None:
    """Completes options and refuses what cannot be."""
    options.models = list(dict.fromkeys(str(local_path(path)) for path in options.models))
    for path in options.models:
        if not Path(path).exists():
            raise InputError(f"model {path} does not exist")
    for path in options.text:
        if not path.is_file():
            raise InputError(f"{path} is missing; --text takes texts, or .jsonl lines with 'text'")
    require_results(options.out)
    for name in TABLES:
        require_writable(options.out / name)
    if options.data is not None and not options.data.is_dir():
        raise InputError(f"--data is {options.data}; it must be a folder")
    smallest = min(options.lengths)
    if smallest < 2 or (options.stride is not None and not 1 <= options.stride < smallest):
        raise InputError(
            f"--lengths is {options.lengths}, --stride {options.stride}; lengths must be at least "
            "2, the stride from 1 to less than each of them"
        )
    options.device, dtype = placement(options.device, options.dtype)
    options.dtype = str(dtype).removeprefix("torch.")
    on_gpu = options.device.startswith("cuda")
    options.batch_tokens = options.batch_tokens or (65_536 if on_gpu else 8_192)
