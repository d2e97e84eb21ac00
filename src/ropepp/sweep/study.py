"""A sweep's folder and its Optuna studies, made and kept in step with the YAML.

What has been done is read from the run directories. The database lists the points (study ``NAME``)
and, where a sampler draws some, has a study ``NAME/ROW`` for each row, so that no row learns from
another. All access is under one lock: SQLite fails where several processes write at once.
"""

import contextlib
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.files import write_json
from ropepp.runs import records
from ropepp.runs.records import RESULT, TRIAL, Trial
from ropepp.runs.settings import canonical, differences
from ropepp.runs.status import LOCK, LOG, OUTCOME, is_locked, read_json
from ropepp.sweep.database import connect, distributions, hidden, import_optuna, pruner, sampler
from ropepp.sweep.spec import Row, Spec

RESOLVED = "resolved.json"


@dataclass(frozen=True)
class Point:
    """What one trial of a study stands for: a run of the grid, or a drawn row with all its seeds.

    Attributes:
        key: Its name, by which trials are told apart.
        study: Name of its study.
        runs: Its runs, to be made in this order.
    """

    key: str
    study: str
    runs: tuple[Trial, ...]

    @property
    def is_drawn(self) -> bool:
        return self.key != self.runs[0].run


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Waits until no other driver is in such a block for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Sweep:
    """A sweep that has been set up; see `open_sweep`."""

    def __init__(self, spec: Spec, rows: dict[str, dict[str, Any]]) -> None:
        self.spec = spec
        self.folder = spec.folder
        self.overrides = {name: entry["overrides"] for name, entry in rows.items()}
        self.optuna = import_optuna()
        self.storage = connect(spec)
        self.studies: dict[str, Any] = {}

    def directory(self, trial: Trial) -> Path:
        return self.folder / trial.run

    def metric(self, trial: Trial) -> float | None:
        """What a finished run came to.

        Raises:
            InputError: Its result lacks the sweep's metric.
        """
        result = read_json(self.directory(trial) / RESULT)
        return records.metric_value(result, self.spec.metric, trial.run) if result else None

    # The points

    def points(self) -> list[Point]:
        """The grid, a seed of all rows after the other, so that what is done can be compared; and
        what has been drawn so far."""
        rows = [self._runs(row, self.overrides[row.name]) for row in self.spec.rows]
        found = [
            Point(run.run, self.spec.name, (run,))
            for one_seed in zip(*rows, strict=True)
            for run in one_seed
        ]
        for row in self.spec.rows if self.spec.search else []:
            drawn = [self._point(row, trial.params) for trial in self._drawn(row)]
            found += {point.key: point for point in drawn}.values()  # one may be drawn twice
        return found

    def draw(self) -> bool:
        """Lets the sampler add a point to the row that has the fewest; returns whether one was
        missing."""
        if not self.spec.search:
            return False
        with exclusive(self.folder):
            counts = {row.name: len(self._drawn(row)) for row in self.spec.rows}
            row = min(self.spec.rows, key=lambda row: counts[row.name])
            if counts[row.name] >= self.spec.trials:
                return False
            self._tell_given(row)
            study = self._study(f"{self.spec.name}/{row.name}")
            # With one seed for all of them, every draw would repeat the first.
            study.sampler = sampler(self.spec, self.spec.seed + counts[row.name])
            trial = study.ask(distributions(self.spec))
            for run in self._point(row, trial.params).runs:
                self._write_trial(run)
            self._write_plan()
        return True

    def _runs(self, row: Row, overrides: dict[str, Any]) -> list[Trial]:
        return [Trial(row.name, seed, overrides, row.settings) for seed in self.spec.seeds]

    def _point(self, row: Row, params: dict[str, Any]) -> Point:
        drawn = self.spec.drawn(row, params)
        values = {key: drawn.asked[key] for key in self.spec.search}
        runs = self._runs(drawn, self.overrides[row.name] | values)
        return Point(drawn.name, f"{self.spec.name}/{row.name}", tuple(runs))

    def _drawn(self, row: Row) -> list[Any]:
        """Trials of a row's study for drawn points, one each."""
        trials = self._study(f"{self.spec.name}/{row.name}").get_trials(deepcopy=False)
        return [
            trial
            for trial in trials
            if not {"given", "again"} & set(trial.user_attrs)
            and set(trial.params) == set(self.spec.search)
        ]

    def _tell_given(self, row: Row) -> None:
        """Tells the sampler what the row's own values came to, once they are done."""
        study = self._study(f"{self.spec.name}/{row.name}")
        trials = [Trial(row.name, seed, {}) for seed in self.spec.seeds]
        values = [self.metric(trial) for trial in trials]
        if None in values or any("given" in t.user_attrs for t in study.get_trials()):
            return
        flat, ranges = self.spec.flat(row), distributions(self.spec)
        params = {key: flat.get(canonical(key)) for key in self.spec.search}
        for key, value in params.items():
            low, high = (getattr(ranges[key], name, None) for name in ("low", "high"))
            inside = low <= value <= high if low is not None and value is not None else False
            if not inside and value not in getattr(ranges[key], "choices", ()):
                return
        study.add_trial(
            self.optuna.create_trial(
                params=params,
                distributions=ranges,
                value=mean([value for value in values if value is not None]),
                intermediate_values=intermediate(self.directory(trials[0]), self.spec.metric),
                user_attrs={"given": True},
            )
        )

    # Their states in the database

    def mark(self, point: Point, state: str, value: float | None = None) -> None:
        """Brings the database in step with the run directories.

        Args:
            point: A point.
            state: Name of a state of Optuna's trials.
            value: Of a complete one.
        """
        if value is not None and value != value:  # the database refuses what is no number
            state, value = "FAIL", None
        new = self.optuna.trial.TrialState[state]
        try:
            with exclusive(self.folder):
                for trial in self._trials(point):
                    if not trial.state.is_finished() and trial.state != new:
                        values = None if value is None else [value]
                        self.storage.set_trial_state_values(trial._trial_id, new, values)
        except self.optuna.exceptions.StorageInternalError as error:
            # The run directories know it, and the next driver will bring the database in step.
            print(f"warning: {point.key} is not marked as {state}: {error}", file=sys.stderr)

    def _trials(self, point: Point) -> list[Any]:
        trials = self._study(point.study).get_trials(deepcopy=False)
        if not point.is_drawn:
            return [trial for trial in trials if trial.user_attrs.get("key") == point.key]
        row = next(row for row in self.spec.rows if f"{self.spec.name}/{row.name}" == point.study)
        searched = set(self.spec.search)
        return [
            trial
            for trial in trials
            if set(trial.params) == searched
            and self.spec.drawn(row, trial.params).name == point.key
            and "given" not in trial.user_attrs
        ]

    def try_again(self, point: Point) -> None:
        """Lists a failed point anew: Optuna's finished trials stay what they are."""
        with exclusive(self.folder):
            study, (first, *_) = self._study(point.study), self._trials(point)
            if point.is_drawn:
                again = self.optuna.create_trial(
                    state=self.optuna.trial.TrialState.RUNNING,
                    params=first.params,
                    distributions=first.distributions,
                    user_attrs={"again": True},
                )
                study.add_trial(again)
            else:
                study.enqueue_trial({}, user_attrs=first.user_attrs)

    def should_prune(self, point: Point, seen: dict[int, float]) -> bool:
        """Whether the pruner would end a point of which these values are known by step."""
        with exclusive(self.folder):
            study = self._study(point.study)
            study.pruner = pruner(self.spec)
            for frozen in self._trials(point):
                if frozen.state.is_finished():
                    continue
                trial = self.optuna.Trial(study, frozen._trial_id)
                for step in sorted(set(seen) - set(frozen.intermediate_values)):
                    trial.report(seen[step], step)
                return bool(trial.should_prune())
        return False

    def _study(self, name: str) -> Any:
        if name not in self.studies:
            self.studies[name] = self.optuna.create_study(
                storage=self.storage, study_name=name, load_if_exists=True
            )
        return self.studies[name]

    # Setting up

    def set_up(self, resolved: dict[str, Any]) -> None:
        """Writes the folder's files, lists what is missing in the database, and takes back what
        drivers that are no more have left there."""
        study = self._study(self.spec.name)
        known = study.user_attrs.get("fixed")
        refuse_changes(self.spec, known, f"study {self.spec.name!r} of {hidden(self.spec)}")
        if known is None:
            study.set_user_attr("fixed", self.spec.fixed)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RESOLVED, resolved)
        for row in self.spec.rows if self.spec.search else []:
            self._restore(row)
        listed = {trial.user_attrs.get("key") for trial in study.get_trials(deepcopy=False)}
        runs = [(point, run) for point in self.points() for run in point.runs]
        for point, run in runs:
            self._write_trial(run)
            if not point.is_drawn and point.key not in listed:
                attributes = {"key": point.key, "variant": run.variant, "seed": run.seed}
                study.enqueue_trial({}, user_attrs=attributes | {"overrides": run.overrides})
        waiting, running = (self.optuna.trial.TrialState[s] for s in ("WAITING", "RUNNING"))
        for trial in study.get_trials(deepcopy=False, states=(running,)):
            if not is_driven(self.folder / trial.user_attrs["key"]):  # its driver is no more
                self.storage.set_trial_state_values(trial._trial_id, waiting)
        self._forget({run.run for _, run in runs})
        self._write_plan()

    def _write_trial(self, run: Trial) -> None:
        directory = self.directory(run)
        if not (directory / RESULT).exists() and read_json(directory / TRIAL) != asdict(run):
            records.write_trial(directory, run)

    def _restore(self, row: Row) -> None:
        """Lists drawn points that have a folder and are in no study: the database was lost."""
        study = self._study(f"{self.spec.name}/{row.name}")
        known = {self._point(row, trial.params).key for trial in self._drawn(row)}
        for file in sorted(self.folder.glob(f"{row.name}-*/*/{TRIAL}")):
            trial = Trial(**json.loads(file.read_text()))
            params = {key: trial.overrides.get(key) for key in self.spec.search}
            if None in params.values() or self.spec.drawn(row, params).name != trial.variant:
                continue
            if trial.variant not in known:
                known.add(trial.variant)
                running = self.optuna.trial.TrialState.RUNNING
                ranges = distributions(self.spec)
                study.add_trial(
                    self.optuna.create_trial(state=running, params=params, distributions=ranges)
                )

    def _forget(self, wanted: set[str]) -> None:
        """Removes traces of runs that are no longer asked for and have not begun."""
        for file in list(self.folder.rglob(TRIAL)):
            run, own = str(file.parent.relative_to(self.folder)), list(file.parent.iterdir())
            if run not in wanted and own == [file]:
                shutil.rmtree(file.parent)

    def _write_plan(self) -> None:
        drawn = [
            self.spec.drawn(row, trial.params)
            for row in (self.spec.rows if self.spec.search else [])
            for trial in self._drawn(row)
        ]
        distinct = list({row.name: row for row in drawn}.values())
        records.write_plan(self.folder, self.spec.plan(distinct))


def open_sweep(spec: Spec) -> Sweep:
    """Checks a sweep, makes or grows its folder and studies, and returns it; safe to call again
    and from several processes at once.

    Raises:
        InputError: ``fit`` would refuse a row, the storage cannot be reached, or a sweep of that
            name exists that was asked for differently.
    """
    with exclusive(spec.folder):
        resolved = read_json(spec.folder / RESOLVED)
        refuse_changes(spec, resolved.get("fixed"), str(spec.folder))
        rows: dict[str, Any] = resolved.get("rows", {})
        for row in spec.rows:
            known = rows.get(row.name, {})
            if known.get("asked") == row.asked:
                continue
            if known and has_begun(spec.folder / row.name):
                words = "; ".join(differences(known["asked"], row.asked))
                raise InputError(
                    f"{spec.file}: variants.{row.variant}: {words}; {spec.folder / row.name} was "
                    "trained before: choose another name for the new one"
                )
            from ropepp.sweep.check import check_row  # imports Lightning: only if need be

            rows[row.name] = {"asked": row.asked, "overrides": check_row(spec, row)}
            for file in (spec.folder / row.name).glob(f"*/{OUTCOME}"):
                file.unlink()  # of other settings
        if spec.pruner != "none":
            pruner(spec)
        sweep = Sweep(spec, rows)
        sweep.set_up({"fixed": spec.fixed, "rows": rows})
    return sweep


def has_begun(folder: Path) -> bool:
    """Whether a row has something to lose."""
    patterns = (f"*/{RESULT}", "*/checkpoints/step-*")
    return any(any(folder.glob(pattern)) for pattern in patterns) or any(
        map(is_driven, folder.glob("seed-*"))
    )


def is_driven(directory: Path) -> bool:
    """Whether a driver or a process cares for a run."""
    return is_locked(directory / LOCK) or is_locked(directory / LOG)


def refuse_changes(spec: Spec, known: dict[str, Any] | None, where: str) -> None:
    """Raises an `InputError` if a sweep of that name was another one."""
    # Through JSON, as what is known has been.
    words = list(differences(known, json.loads(json.dumps(spec.fixed)))) if known else []
    if words:
        raise InputError(
            f"{spec.file}: {where} was made from other settings ({'; '.join(words)}); variants, "
            "axes, seeds and trials may grow, what all runs share may not change: choose another "
            f"name, or delete {spec.folder} and what the database has of it"
        )


def intermediate(directory: Path, metric: str) -> dict[int, float]:
    """A run's evaluations by step."""
    key = metric if "/" in metric else metric.replace("_", "/", 1)
    run = records.Run(Trial("", 0, {}), directory, "", {})
    return {line["step"]: line[key] for line in run.metrics() if key in line}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
