"""Stages of training one after another, each a ``fit``: pre-training, decay, longer contexts.

A pipeline's YAML names variants and stages. Every variant runs through all of its stages; a stage
lives in ``LOGS/NAME/VARIANT/STAGE/`` and is done when its ``result.json`` is there, so that the
same command goes on wherever it was interrupted.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ropepp.errors import InputError, Preempted
from ropepp.files import write_text
from ropepp.runs.settings import (
    LAUNCHER,
    as_flag,
    check_launcher,
    launch_words,
    named_files,
    names_file,
    read_yaml,
)
from ropepp.runs.status import LOG, duration, is_locked, last_lines, progress_of

TAKE = {
    "everything": "step, data, weights and optimizer go on as if the stage before had not ended",
    "weights": "only the weights go on",
    "moments": "weights and the optimizer's moments go on; step, schedule and data begin anew",
}
PATIENCE = 600.0  # seconds for a fit that is asked to end, before it is killed


@dataclass(frozen=True)
class Stage:
    """One ``fit`` of each variant.

    Attributes:
        name: Its name, which is that of its folder.
        config: Configuration files of ``fit``, laid over the base and the variant.
        after: The stage from whose last checkpoint it begins; from nothing unless given.
        take: What it takes from there, see `TAKE`.
        set: Keys of ``fit`` and values, laid over all of these.
        variants: Which variants have it; all of them unless given.
    """

    name: str
    config: list[Path] = field(default_factory=list)
    after: str | None = None
    take: str = "weights"
    set: dict[str, Any] = field(default_factory=dict)
    variants: list[str] | None = None


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as its YAML asks for it.

    Attributes:
        name: Its name, which is that of its folder.
        base: Configuration files of ``fit`` under everything else.
        variants: For each name, keys of ``fit`` and values.
        stages: The stages in order.
        seed: Seed of every run.
        launcher: The command of a run; ``{python}`` and ``{args}`` are filled in.
        logs: Folder of all experiments.
    """

    name: str
    base: list[Path]
    variants: dict[str, dict[str, Any]]
    stages: list[Stage]
    seed: int = 0
    launcher: str = LAUNCHER
    logs: str = "logs"

    @property
    def folder(self) -> Path:
        return Path(self.logs, self.name)

    def directory(self, variant: str, stage: str) -> Path:
        """Folder of a run."""
        return self.folder / variant / stage

    def stages_of(self, variant: str) -> list[Stage]:
        """The stages that a variant has."""
        return [s for s in self.stages if s.variants is None or variant in s.variants]

    def arguments(self, variant: str, stage: Stage) -> list[str]:
        """Arguments of ``fit``, without the checkpoint to begin with."""
        return [
            *(f"--config={file}" for file in self.base),
            *(as_flag(key, value) for key, value in self.variants[variant].items()),
            *(f"--config={file}" for file in stage.config),
            *(as_flag(key, value) for key, value in stage.set.items()),
            f"--experiment={self.name}",
            f"--run={variant}/{stage.name}",
            f"--logs={self.logs}",
            f"--seed_everything={self.seed}",
            "--resume=auto",
        ]

    def beginning(self, variant: str, stage: Stage) -> list[str]:
        """The arguments that say from which checkpoint a stage begins.

        Raises:
            InputError: The stage before has left no checkpoint.
        """
        if stage.after is None:
            return []
        from ropepp.runs.checkpoints import newest_complete

        folder = self.directory(variant, stage.after) / "checkpoints"
        found = newest_complete(folder)
        if found is None:
            raise InputError(f"{folder} holds no complete checkpoint for stage {stage.name!r}")
        if stage.take == "everything":
            return [f"--ckpt_path={found}"]
        return [f"--init_from={found}", f"--init_optimizer={str(stage.take == 'moments').lower()}"]

    def command(self, variant: str, stage: Stage) -> list[str]:
        """The command of a run."""
        args = self.arguments(variant, stage) + self.beginning(variant, stage)
        return launch_words(self.launcher, args, python=sys.executable)


def load(file: Path) -> Pipeline:
    """Reads a pipeline's YAML; files in it are relative to it.

    Raises:
        InputError: The file is missing or says something that is not allowed.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: a pipeline has keys such as name, base, variants and stages")
    known = _checked(file, "", content, Pipeline, required=("name", "base", "variants", "stages"))
    known["base"] = _files(file, "base", known["base"])
    variants = known["variants"]
    if not isinstance(variants, dict) or not variants:
        raise InputError(f"{file}: variants is {variants!r}; allowed: names and their keys of fit")
    known["variants"] = {
        str(name): _located(file, f"variants.{name}", own or {}) for name, own in variants.items()
    }
    stages: list[Stage] = []
    for number, given in enumerate(known["stages"]):
        stages.append(_stage(file, f"stages[{number}]", given, stages, list(known["variants"])))
    try:
        check_launcher(known.get("launcher", LAUNCHER), ("python", "args"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return Pipeline(**{**known, "stages": stages})


def _stage(file: Path, at: str, given: Any, before: list[Stage], variants: list[str]) -> Stage:
    known = _checked(file, at, given, Stage, required=("name",))
    known["config"] = _files(file, f"{at}.config", known.get("config", []))
    known["set"] = _located(file, f"{at}.set", known.get("set", {}))
    stage = Stage(**known)
    earlier = {other.name: other for other in before}
    if stage.name in earlier:
        raise InputError(f"{file}: two stages have the name {stage.name!r}")
    if stage.take not in TAKE:
        raise InputError(f"{file}: {at}.take is {stage.take!r}; allowed: {', '.join(TAKE)}")
    if stage.after is not None and stage.after not in earlier:
        allowed = ", ".join(earlier) or "none, it is the first"
        raise InputError(f"{file}: {at}.after is {stage.after!r}; allowed: {allowed}")
    for variant in stage.variants or []:
        if variant not in variants:
            allowed = ", ".join(variants)
            raise InputError(f"{file}: {at}.variants has {variant!r}; allowed: {allowed}")
        source = earlier.get(stage.after or "")
        if source is not None and source.variants is not None and variant not in source.variants:
            raise InputError(f"{file}: {at}: {variant} has no stage {stage.after!r} to begin from")
    return stage


def _checked(
    file: Path, at: str, given: Any, kind: type, required: tuple[str, ...]
) -> dict[str, Any]:
    allowed = [one.name for one in fields(kind)]
    where = f"{at}." if at else ""
    if not isinstance(given, dict):
        raise InputError(f"{file}: {at} is {given!r}; allowed: {', '.join(allowed)}")
    for key in given:
        if key not in allowed:
            raise InputError(f"{file}: unknown key {where}{key}; allowed: {', '.join(allowed)}")
    for key in required:
        if not given.get(key):
            raise InputError(f"{file}: {where}{key} is missing or empty")
    return dict(given)


def _files(file: Path, at: str, given: Any) -> list[Path]:
    names = [given] if isinstance(given, str) else given
    paths = [(file.parent / name).resolve() for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise InputError(f"{file}: {at} is {name!r}, which is no file beside {file}")
    return paths


def _located(file: Path, at: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``fit`` with the names of files made absolute."""
    if not isinstance(given, dict):
        raise InputError(f"{file}: {at} is {given!r}; allowed: keys of fit and values")
    for value in given.values():
        _files(file, at, list(named_files(value)))
    return {
        key: str((file.parent / value).resolve()) if names_file(value) else value
        for key, value in given.items()
    }


class Runner:
    """Runs what is missing of a pipeline.

    Args:
        pipeline: What to run.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def run(self, variants: list[str]) -> None:
        """Runs all stages of these variants and writes the table after each.

        Raises:
            InputError: A stage failed.
            Preempted: This process was asked to end; the stage has saved and can go on.
        """
        before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            for variant in variants:
                for stage in self.pipeline.stages_of(variant):
                    self._stage(variant, stage)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stage(self, variant: str, stage: Stage) -> None:
        directory = self.pipeline.directory(variant, stage.name)
        name, began = f"{variant}/{stage.name}", time.monotonic()
        while is_locked(directory / LOG):  # a run whose driver was killed
            self._wait(directory, name)
        if (directory / "result.json").exists():
            print(f"{name}: done before", flush=True)
            return
        directory.mkdir(parents=True, exist_ok=True)
        print(f"{name}: begins, see {directory / LOG}", flush=True)
        self._start(self.pipeline.command(variant, stage), directory / LOG)
        assert self._process is not None
        while self._process.poll() is None:
            self._wait(directory, name)
        if self._process.returncode and (self._asked or self._process.returncode == Preempted.code):
            raise Preempted(f"{name} has saved and ended on request")
        if not (directory / "result.json").exists():
            said = [line.strip() for line in last_lines(directory / LOG) if line.strip()]
            raise InputError(f"{name} failed: {said[-1] if said else 'no output'}; see {LOG}")
        write_table(self.pipeline)
        result = json.loads((directory / "result.json").read_text())
        took = duration(time.monotonic() - began)
        print(f"{name}: validation loss {result['validation_loss']:.4f}, {took}", flush=True)

    def _start(self, command: list[str], file: Path) -> None:
        log = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # Every process below inherits it: the lock lives as long as any of them.
            fcntl.flock(log, fcntl.LOCK_EX)
            os.write(log, f"\n$ {shlex.join(command)}\n".encode())
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        finally:
            os.close(log)

    def _wait(self, directory: Path, name: str) -> None:
        time.sleep(0.2)
        if sys.stdout.isatty():
            now = progress_of(directory, name)
            left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
            loss = "" if now.train_loss is None else f", loss {now.train_loss:.3f}"
            print(f"\r{name}: step {now.step:,}{loss}{left}    ", end="\r", flush=True)

    def _ask(self, number: int, frame: object) -> None:
        if self._process is None or self._process.poll() is not None:
            raise Preempted("ended on request between two stages")
        if not self._asked:
            os.killpg(self._process.pid, signal.SIGTERM)
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        self._asked = True

    def _kill(self, number: int, frame: object) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)


def write_table(pipeline: Pipeline) -> Path:
    """Writes ``pipeline.md``: a row for each stage of each variant that is done."""
    lines = [
        f"# {pipeline.name}",
        "",
        "| variant | stage | row | steps | tokens | validation loss | perplexity | longer rows |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    commits, devices = set(), set()
    for variant in pipeline.variants:
        for stage in pipeline.stages_of(variant):
            file = pipeline.directory(variant, stage.name) / "result.json"
            if not file.exists():
                continue
            result = json.loads(file.read_text())
            commits.add(str(result["commit"]))
            devices.add(f"{result['world_size']} x {result['device']}")
            lines.append(_row(variant, stage.name, result))
    lines += [
        "",
        f"Seed {pipeline.seed}, one a variant: a smoke test; differences may be noise.",
        f"Commit {', '.join(sorted(commits))}; {', '.join(sorted(devices))}.",
    ]
    path = pipeline.folder / "pipeline.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _row(variant: str, stage: str, result: dict[str, Any]) -> str:
    longer = [
        f"{key.removeprefix('validation_').removesuffix('/loss')} {value:.3f}"
        for key, value in result["evaluation"].items()
        if key.startswith("validation_") and key.endswith("/loss")
    ]
    return (
        f"| {variant} | {stage} | {result['sequence_length']:,} | {result['steps']:,} | "
        f"{result['tokens']:,} | {result['validation_loss']:.4f} | "
        f"{result['validation_perplexity']:.2f} | {', '.join(longer)} |"
    )
