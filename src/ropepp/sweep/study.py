"""A sweep's folder, made and grown with the YAML: what there is to run, and what has come of it.

The run folders hold all of it. What may be changed by one driver alone is done under a lock.
"""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ropepp.errors import InputError
from ropepp.files import lock, run_folder, write_json
from ropepp.runs import records
from ropepp.runs.records import TRIAL, Run, RunSpec
from ropepp.runs.settings import canonical, differences
from ropepp.runs.status import LOCK, LOG, OUTCOME, is_locked, read_outcome
from ropepp.sweep import search
from ropepp.sweep.config import SweepConfig, SweepRow
from ropepp.sweep.search import Known

RESOLVED = "resolved.json"


@dataclass(frozen=True)
class Trial:
    """What is run as one: a run of the grid, or a drawn row's, by seed, and its searched values."""

    name: str
    runs: tuple[RunSpec, ...]
    params: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Waits until no other driver is in such a block for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("w") as file:
        lock(file.fileno(), folder, fcntl.LOCK_EX)
        yield


class SweepStudy:
    """A sweep that has been set up; see `open_sweep`."""

    def __init__(self, config: SweepConfig, rows: dict[str, dict[str, Any]]) -> None:
        self.config, self.folder = config, config.folder
        self.overrides = {name: entry["overrides"] for name, entry in rows.items()}

    def directory(self, spec: RunSpec) -> Path:
        return self.folder / spec.run

    def metric(self, spec: RunSpec) -> float:
        """What a finished run came to; an `InputError` if its result lacks the sweep's metric."""
        result = records.read_result(self.directory(spec))
        return records.metric_value(result, self.config.metric, spec.run)

    def evaluations(self, spec: RunSpec) -> dict[int, float]:
        metric = self.config.metric
        key = metric if "/" in metric else metric.replace("_", "/", 1)
        lines = Run(spec, self.directory(spec)).metrics()
        return {line["step"]: line[key] for line in lines if key in line}

    def state_of(self, trial: Trial) -> str:
        """Open, or complete, failed or pruned."""
        for spec in trial.runs:
            if not records.read_result(self.directory(spec)):
                state = read_outcome(self.directory(spec)).get("state")
                return state if state in ("failed", "pruned") else "open"
        return "complete"

    def trials(self) -> list[Trial]:
        """The grid, seed by seed, so that what is done can be compared; and what was drawn."""
        rows = [self._runs(row, self.overrides[row.name]) for row in self.config.rows]
        grid = [Trial(run.run, (run,)) for one_seed in zip(*rows, strict=True) for run in one_seed]
        return [*grid, *(trial for row in self.config.rows for trial in self.drawn(row))]

    def drawn(self, row: SweepRow) -> list[Trial]:
        """What was drawn for a row, in that order."""
        found = {}
        for file in self.folder.glob(f"{row.name}-*/*/{TRIAL}") if self.config.search else ():
            spec = records.read_spec(file, self.folder)
            if spec is None:
                continue
            params = {key: spec.overrides.get(key) for key in self.config.search}
            if None not in params.values() and spec.variant not in found:
                trial = self._trial(row, params)
                if trial.name == spec.variant:  # and not of a row with a longer name
                    found[trial.name] = trial
        try:
            order = records.read_plan(self.folder).variants
        except InputError:  # it is the first time, or the plan is damaged
            order = []
        place = {name: number for number, name in enumerate(order)}
        return sorted(found.values(), key=lambda one: (place.get(one.name, len(order)), one.name))

    def draw(self) -> bool:
        """Draws a trial for the row that has the fewest; returns whether one was missing."""
        with exclusive(self.folder):
            drawn = {row.name: self.drawn(row) for row in self.config.rows}
            for row in sorted(self.config.rows, key=lambda row: len(drawn[row.name])):
                own = drawn[row.name]
                if len(own) >= self.config.trials:
                    return False
                names = {trial.name for trial in own}
                for params in search.proposals(self.config, self._known(row, own), len(own)):
                    trial = self._trial(row, params)
                    if trial.name not in names:
                        for spec in trial.runs:
                            self.write(spec)
                        self._write_plan()
                        return True
                # All that there is between the bounds has been drawn.
        return False

    def is_hopeless(self, trial: Trial, steps: Set[int]) -> bool:
        """Whether the pruner would end a drawn trial, of whose first run these steps are new."""
        for row in self.config.rows:
            own = self.drawn(row)
            names = [other.name for other in own]
            if trial.name in names:
                known, at = self._known(row, own), names.index(trial.name)
                return search.is_hopeless(self.config, known, at, steps)
        return False

    def _known(self, row: SweepRow, drawn: Sequence[Trial]) -> list[Known]:
        """What Optuna is told of a row: drawn trials, and its own values, once done, if allowed."""
        flat = self.config.flat(row)
        params = {key: flat.get(canonical(key)) for key in self.config.search}
        given = Trial(row.name, tuple(self._runs(row, self.overrides[row.name])), params)
        wanted = search.accepts(self.config, params) and self.state_of(given) == "complete"
        known = []
        for trial in [*drawn, given] if wanted else drawn:
            state, value = self.state_of(trial), None
            if state == "complete":
                value = fmean(map(self.metric, trial.runs))
                if not math.isfinite(value):
                    state, value = "failed", None
            known.append(Known(trial.params, self.evaluations(trial.runs[0]), state, value))
        return known

    def _runs(self, row: SweepRow, overrides: dict[str, Any]) -> list[RunSpec]:
        settings = self.config.settings(row)
        return [RunSpec(row.name, seed, overrides, settings) for seed in self.config.seeds]

    def _trial(self, row: SweepRow, params: dict[str, Any]) -> Trial:
        drawn = self.config.drawn(row, params)
        values = {key: drawn.asked[key] for key in self.config.search}
        runs = self._runs(drawn, self.overrides[row.name] | values)
        return Trial(drawn.name, tuple(runs), values)

    def set_up(self, resolved: dict[str, Any]) -> None:
        """Writes the folder's files; removes those of runs that are gone and have not begun."""
        write_json(self.folder / RESOLVED, resolved)
        specs = [spec for trial in self.trials() for spec in trial.runs]
        for spec in specs:
            self.write(spec)
        wanted = {self.directory(spec) for spec in specs}
        for file in list(self.folder.rglob(TRIAL)):
            if file.parent not in wanted and list(file.parent.iterdir()) == [file]:
                shutil.rmtree(file.parent)
        self._write_plan()

    def write(self, spec: RunSpec) -> None:
        """Writes down what a run is, unless it has finished as something else."""
        directory = run_folder(Path(self.config.logs), self.config.name, spec.run)
        known = records.read_json(directory / TRIAL)
        if known != asdict(spec) and not (known and records.read_result(directory)):
            write_json(directory / TRIAL, asdict(spec))

    def _write_plan(self) -> None:
        pairs = ((row, trial) for row in self.config.rows for trial in self.drawn(row))
        rows = [self.config.drawn(row, trial.params) for row, trial in pairs]
        write_json(self.folder / records.PLAN, asdict(self.config.plan(rows)))


def open_sweep(config: SweepConfig) -> SweepStudy:
    """Checks a sweep and makes or grows its folder, for several processes at once too. An
    `InputError` if ``fit`` would refuse a row, or the folder is of other settings."""
    fixed = config.fixed  # read before anything is made
    with exclusive(config.folder):
        resolved = records.read_json(config.folder / RESOLVED, _check_resolved)
        known = resolved.get("fixed")
        # Through JSON, as what is known has been.
        words = list(differences(known, json.loads(json.dumps(fixed)))) if known else []
        if words:
            raise InputError(
                f"{config.file}: {config.folder} was made from other settings "
                f"({'; '.join(words)}); variants, axes, seeds and trials may grow, what all runs "
                f"share may not change: choose another name, or delete {config.folder}"
            )
        rows: dict[str, Any] = resolved.get("rows", {})
        for row in config.rows:
            known = rows.get(row.name, {})
            if known.get("asked") == row.asked:
                continue
            if known and has_begun(config.folder / row.name):
                changed = "; ".join(differences(known["asked"], row.asked))
                raise InputError(
                    f"{config.file}: variants.{row.variant}: {changed}; {config.folder / row.name} "
                    "was trained before: choose another name for the new one"
                )
            from ropepp.sweep.check import check_row  # imports Lightning: only if need be

            rows[row.name] = {"asked": row.asked, "overrides": check_row(config, row)}
            if not known:
                _refuse_others(config, row.name, rows[row.name]["overrides"])
            for file in (config.folder / row.name).glob(f"*/{OUTCOME}") if known else ():
                file.unlink()  # of other settings
        if config.search:
            search.pruner(config)
        study = SweepStudy(config, rows)
        study.set_up({"fixed": fixed, "rows": rows})
    return study


def _check_resolved(content: dict[str, Any]) -> None:
    dict(content["fixed"])
    for row in dict(content["rows"]).values():
        dict(row["asked"]) | dict(row["overrides"])


def _refuse_others(config: SweepConfig, name: str, overrides: dict[str, Any]) -> None:
    """Refuses a row whose runs were begun with other overrides, as only their own files know."""
    for file in (config.folder / name).glob(f"*/{TRIAL}"):
        spec = records.read_spec(file, config.folder) if has_begun(config.folder / name) else None
        if spec and (words := list(differences(spec.overrides, json.loads(json.dumps(overrides))))):
            raise InputError(
                f"{config.file}: {file.parent} was begun with other settings ({'; '.join(words)}): "
                "choose another name for the new one"
            )


def has_begun(folder: Path) -> bool:
    """Whether a row has something to lose: a result, a checkpoint, or a run that is cared for."""
    patterns = (f"*/{records.RESULT}", "*/checkpoints/step-*")
    locks = (file for name in (LOCK, LOG) for file in folder.glob(f"seed-*/{name}"))
    return any(any(folder.glob(pattern)) for pattern in patterns) or any(map(is_locked, locks))
