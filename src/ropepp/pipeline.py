"""Stages of training one after another, each a ``fit``: pre-training, decay, longer contexts.

A pipeline's YAML names variants and stages, through which every variant runs. A stage lives in
``LOGS/NAME/VARIANT/STAGE/`` and is done when its ``result.json`` is there.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ropepp.errors import Diverged, InputError, Preempted
from ropepp.files import run_folder, write_json, write_text
from ropepp.runs import process
from ropepp.runs.config import AnyText, FitFiles, FitKeys, RunsConfig, read_config
from ropepp.runs.process import RunProcess, StopRequest
from ropepp.runs.records import DIVERGED, RESULT, read_json, read_result
from ropepp.runs.settings import differences, read_files, read_yaml
from ropepp.runs.status import LOG, duration, is_locked, list_checkpoints, progress_of
from ropepp.runs.survival import lasting_output
from ropepp.runs.table import number, read_rows, table

Take = Literal["everything", "progress", "weights", "moments"]
GOING_ON = ("everything", "progress")  # takes that the steps go on with
ASKED = "asked.json"  # in a stage's folder
KNOWN_BY = ("steps", "train_loss", "validation_loss")
GRACE = 600.0  # seconds for a fit that is asked to end, before it is killed


@dataclass(frozen=True)
class Stage:
    """One ``fit`` of each variant; docs/train.md says what the keys mean."""

    name: AnyText
    config: FitFiles = field(default_factory=list)
    after: Annotated[str | None, "an earlier stage"] = None
    take: Annotated[Take, ", ".join(get_args(Take))] = "weights"
    set: FitKeys = field(default_factory=dict)
    variants: Annotated[list[str] | None, "a list of variants"] = None


@dataclass(frozen=True, kw_only=True)
class Pipeline(RunsConfig):
    """A pipeline as its YAML asks for it."""

    stages: Annotated[list, "a list of stages"]

    def __post_init__(self) -> None:
        super().__post_init__()
        for at, stage in enumerate(self.stages):
            self._check(f"stages[{at}]", stage, {one.name: one for one in self.stages[:at]})

    def _check(self, at: str, stage: Stage, before: Mapping[str, Stage]) -> None:
        self.check_name(f"{at}.name", stage.name)
        self.check_files(f"{at}.config", stage.config)
        self.check_fit_keys(f"{at}.set", stage.set)
        if stage.name in before:
            self.refuse(f"two stages have the name {stage.name!r}")
        if stage.after is not None and stage.after not in before:
            allowed = ", ".join(before) or "none, it is the first"
            self.refuse(f"{at}.after is {stage.after!r}; allowed: {allowed}")
        if stage.after is None and stage.take != "weights":
            self.refuse(f"{at}.take is {stage.take!r}, but there is no stage that it is after")
        own = list(self.variants) if stage.variants is None else stage.variants
        if not own:
            self.refuse(f"{at}.variants is empty; leave it out for all")
        self.check_variants(f"{at}.variants", own)
        for variant in own:
            if stage.after and before[stage.after] not in self.stages_of(variant):
                self.refuse(f"{at}: {variant} has no stage {stage.after!r} to begin from")

    def directory(self, variant: str, stage: str) -> Path:
        """Folder of a run; no link out of the pipeline's."""
        return run_folder(Path(self.logs), self.name, f"{variant}/{stage}")

    def stages_of(self, variant: str) -> list[Stage]:
        """The stages that a variant has."""
        return [s for s in self.stages if s.variants is None or variant in s.variants]

    def asked(self, variant: str, stage: Stage) -> dict[str, Any]:
        """What the YAML and the files that it names say of a stage now, as JSON has it, and what
        came of all that it goes back to: one of these that is trained anew has other losses."""
        told: dict[str, Any] = {"base": self.base, "set": self.set, "seed": self.seed}
        told |= {"variant": self.variants[variant], "stage": vars(stage) | {"variants": None}}
        while stage.after is not None:
            result = read_result(self.directory(variant, stage.after))
            told.setdefault("parents", {})[stage.after] = {key: result.get(key) for key in KNOWN_BY}
            stage = next(one for one in self.stages if one.name == stage.after)
        return dict(json.loads(json.dumps(read_files(told, self.file.parent))))

    def arguments(self, variant: str, stage: Stage) -> list[str]:
        """Arguments of ``fit``, without the checkpoint to begin with."""
        return [
            *self.configs(self.base),
            *self.flags(self.set | (self.variants[variant] or {})),
            *self.configs(stage.config),
            *self.flags(stage.set),
            f"--experiment={self.name}",
            f"--run={variant}/{stage.name}",
            f"--logs={self.logs}",
            f"--seed_everything={self.seed}",
            "--resume=auto",
        ]

    def beginning(self, variant: str, stage: Stage) -> list[str]:
        """The arguments that say from which checkpoint a stage begins, or an `InputError`."""
        if stage.after is None:
            return []
        from ropepp.runs.checkpoints import newest_complete

        parent, own = (self.directory(variant, name) for name in (stage.after, stage.name))
        last, found = read_result(parent).get("steps"), newest_complete(parent / "checkpoints")
        if found is None or int(found.stem.removeprefix("step-")) != last:
            if newest_complete(own / "checkpoints"):
                return []  # it goes on from its own
            raise InputError(
                f"{stage.name} begins with the last checkpoint of {stage.after}, of step {last}; "
                f"the newest whole one is {found or 'none'}: restore the last, or delete {parent}"
            )
        if stage.take in GOING_ON:
            fresh = str(stage.take == "progress").lower()
            return [f"--ckpt_path={found}", f"--fresh_optimizer={fresh}"]
        return [f"--init_from={found}", f"--init_optimizer={str(stage.take == 'moments').lower()}"]


def load(file: Path) -> Pipeline:
    """Reads a pipeline's YAML. ``like`` names another in the same folder, whose keys stand where
    this one has none. An `InputError` if a file is missing or says what is not allowed."""
    content = read_yaml(file)
    if isinstance(content, dict) and "like" in content:
        like = file.parent / str(content.pop("like"))
        under = read_yaml(like)
        if isinstance(under, dict) and "like" in under:
            raise InputError(f"{file}: like is {like.name}, which has like itself: name its file")
        content = under | content if isinstance(under, dict) else under  # which is refused below
    if isinstance(content, dict) and isinstance(content.get("stages"), list):
        content["stages"] = [
            read_config(Stage, file, given, f"stages[{number}]")
            for number, given in enumerate(content["stages"])
        ]
    return read_config(Pipeline, file, content, file=file)


def run(pipeline: Pipeline, variants: list[str]) -> None:
    """Runs what is missing of all stages of these variants, and writes the table after each. An
    `InputError` if a stage failed; `Preempted` if, asked to end, it has saved and can go on."""
    pipeline.require_launcher()
    check(pipeline, variants)
    with lasting_output(), StopRequest() as stop:
        for variant in variants:
            for stage in pipeline.stages_of(variant):
                directory = pipeline.directory(variant, stage.name)
                directory.mkdir(parents=True, exist_ok=True)
                while (claimed := None if stop.made else process.claim(directory)) is None:
                    if stop.made:
                        raise Preempted("ended on request between two stages")
                    time.sleep(process.POLL)  # another driver has it
                try:
                    _run_stage(pipeline, variant, stage, claimed, stop)
                finally:
                    os.close(claimed)
                if reason := read_result(directory).get(DIVERGED):  # its weights are no numbers
                    raise Diverged(f"{directory} diverged: {reason}; lower the learning rate")


def check(pipeline: Pipeline, variants: list[str]) -> None:
    """Refuses what ``fit`` would of stages that are not done, and one that ends where it begins."""
    for variant in variants:
        ends: dict[str | None, int] = {}  # last steps, by stage
        for stage in pipeline.stages_of(variant):
            if result := read_result(pipeline.directory(variant, stage.name)):
                ends[stage.name] = result.get("steps", 0)
                continue
            from ropepp.sweep.check import EstimateCLI, refused_at  # imports Lightning

            at = f"stages.{stage.name} ({variant})"
            with refused_at(pipeline.file, at):
                cli = EstimateCLI(["fit", *pipeline.arguments(variant, stage)])
                cli.check()
            last = ends[stage.name] = cli.options.trainer.max_steps
            if stage.take in GOING_ON and last <= ends[stage.after]:
                more = f"more than {ends[stage.after]}, at which {stage.after} ends"
                pipeline.refuse(f"{at}: trainer.max_steps is {last}; allowed: {more}")


def _run_stage(
    pipeline: Pipeline, variant: str, stage: Stage, claimed: int, stop: StopRequest
) -> None:
    directory, name = pipeline.directory(variant, stage.name), f"{variant}/{stage.name}"
    run = process.adopt(directory, claimed)  # of a driver that was killed
    asked, known = pipeline.asked(variant, stage), read_json(directory / ASKED)
    words = "; ".join(differences(known, asked)) if known else f"{ASKED} is missing or damaged"
    other = f"with {'other' if known else 'unknown'} settings or parents ({words})"
    if run is None and read_result(directory):
        more = f", {other}; to run it anew, delete {directory}" if words else ""
        print(f"{name}: done before{more}", flush=True)
        return
    begun = is_locked(directory / LOG) or bool(list_checkpoints(directory / "checkpoints"))
    if begun and words:
        if known:
            pipeline.refuse(f"{name} was begun {other}: choose another name, or delete {directory}")
        print(f"{name} was begun {other}", flush=True)
    if run is not None:
        print(f"{name} goes on without its driver: adopted", flush=True)
        _watch(run, name, stop)
    if run is None or not (read_result(directory) or stop.made):
        print(f"{name}: begins, see {directory / LOG}", flush=True)
        args = pipeline.arguments(variant, stage) + pipeline.beginning(variant, stage)
        if not begun:
            write_json(directory / ASKED, asked)
        run = process.start(pipeline.launch(args, python=sys.executable), directory, claimed)
        if run is None:
            raise InputError(f"{name}: processes of an earlier attempt still write to {LOG}")
        _watch(run, name, stop)
    state, reason = run.outcome()
    if state != "finished":
        process.write_outcome(directory, state, reason)
        if stop.made or state == "preempted":
            raise Preempted(f"{name} ended: {reason}; the same command goes on")
        raise InputError(f"{name} failed: {reason}; see {run.log}")
    write_table(pipeline)
    loss = number(read_result(directory).get("validation_loss"), ".4f")
    print(f"{name}: validation loss {loss}, {duration(time.monotonic() - run.began)}", flush=True)


def _watch(run: RunProcess, name: str, stop: StopRequest) -> None:
    """Waits for a run to end, and makes it if that is asked for."""
    while not run.has_ended():
        if stop.made:
            process.end_all([run], GRACE)
        time.sleep(process.POLL)
        if sys.stdout.isatty():
            now = progress_of(run.directory, name)
            left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
            loss = "" if now.train_loss is None else f", loss {now.train_loss:.3f}"
            print(f"\r{name}: step {now.step:,}{loss}{left}    ", end="\r", flush=True)


def write_table(pipeline: Pipeline) -> Path:
    """Writes ``pipeline.md``: a row for each stage of each variant that is done."""
    done = {
        f"{variant}/{stage.name}": pipeline.directory(variant, stage.name) / RESULT
        for variant in pipeline.variants
        for stage in pipeline.stages_of(variant)
    }
    rows = read_rows((name, file) for name, file in done.items() if file.exists())
    path = pipeline.folder / "pipeline.md"
    write_text(path, f"# {pipeline.name}\n\n{table(rows) if rows else ''}")
    return path
