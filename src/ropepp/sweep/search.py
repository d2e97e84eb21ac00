"""Optuna's part in a sweep: it proposes points, and says which runs are not worth going on with.

It keeps nothing: each time it is told what the run folders know. Imported when needed.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ropepp.errors import InputError, optional
from ropepp.sweep.config import MAX_STEPS, SweepConfig

ATTEMPTS = 100  # to draw a point that is new
LEAP = 1_000_003  # between their seeds


@dataclass(frozen=True)
class Known:
    """What the run folders know of a point: values of the searched keys, its first seed's
    evaluations by step, its state (see `SweepStudy.state_of`), and if complete its mean."""

    params: dict[str, Any]
    seen: dict[int, float]
    state: str = "open"
    value: float | None = None


def import_optuna() -> Any:
    optuna = optional("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def proposals(config: SweepConfig, known: Sequence[Known], number: int) -> Iterator[dict[str, Any]]:
    """Points that the sampler would try next, until one is taken, given what is known of its row,
    of which ``number`` were drawn: with one seed for all, every draw would repeat the first."""
    samplers = import_optuna().samplers
    kind = samplers.RandomSampler if config.sampler == "random" else samplers.TPESampler
    study, _ = _study(config, known)
    for attempt in range(ATTEMPTS):
        study.sampler = kind(seed=config.seed + number + LEAP * attempt)
        yield study.ask(distributions(config)).params


def is_hopeless(config: SweepConfig, known: Sequence[Known], at: int, steps: Set[int]) -> bool:
    """Whether the pruner would end the open point at ``at`` at one of these steps, new of it."""
    _, trials = _study(config, known, untold=at)
    found = False
    for step, value in sorted(known[at].seen.items()):
        trials[at].report(value, step)
        found |= trials[at].should_prune() and step in steps
    return found


def accepts(config: SweepConfig, params: dict[str, Any]) -> bool:
    """Whether the values are within the YAML's ranges."""

    def inside(value: Any, how: dict[str, Any]) -> bool:
        if "choices" in how:
            return value in how["choices"]
        return isinstance(value, int | float) and how["low"] <= value <= how["high"]

    return all(inside(params[key], how) for key, how in config.search.items())


def pruner(config: SweepConfig) -> Any:
    """The YAML's pruner; an `InputError` if it has no such option."""
    pruners = import_optuna().pruners
    options = dict(config.pruner_options)
    name = options.pop("name")
    if name == "hyperband":
        steps = config.flat(config.rows[0]).get(MAX_STEPS)
        options = {"max_resource": steps, "min_resource": max(1, (steps or 1) // 9)} | options
    kinds = {"none": "NopPruner", "median": "MedianPruner", "hyperband": "HyperbandPruner"}
    try:
        return getattr(pruners, kinds[name])(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{config.file}: pruner: {error}") from error


def distributions(config: SweepConfig) -> dict[str, Any]:
    """Optuna's form of the YAML's ``search``."""
    kinds, found = import_optuna().distributions, {}
    for key, how in config.search.items():
        if "choices" in how:
            found[key] = kinds.CategoricalDistribution(how["choices"])
        else:
            whole = all(isinstance(how[end], int) for end in how if end != "log")
            kind = kinds.IntDistribution if whole else kinds.FloatDistribution
            found[key] = kind(**how)
    return found


def _study(
    config: SweepConfig, known: Sequence[Known], untold: int | None = None
) -> tuple[Any, list[Any]]:
    """A study in memory, and a trial of it for each point, of which all is told but of one."""
    optuna = import_optuna()
    study = optuna.create_study(pruner=pruner(config), study_name=config.name)
    for point in known:
        study.enqueue_trial(point.params)
    trials = [study.ask(distributions(config)) for _ in known]
    states = {"complete": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
    for number, (trial, point) in enumerate(zip(trials, known, strict=True)):
        if number == untold:
            continue
        for step, value in sorted(point.seen.items()):
            trial.report(value, step)
            if isinstance(study.pruner, optuna.pruners.HyperbandPruner):
                trial.should_prune()  # this is where it notes how far a trial has come
        if point.state != "open":
            study.tell(trial, point.value, state=optuna.trial.TrialState[states[point.state]])
    return study, trials
