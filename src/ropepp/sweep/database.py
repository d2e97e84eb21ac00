"""What a sweep uses of Optuna: storage, samplers, pruners and ranges; imported when needed."""

import re
from typing import Any

from ropepp.errors import InputError
from ropepp.sweep.spec import MAX_STEPS, Spec


def import_optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError("sweeps need optuna: pip install 'ropepp[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def connect(spec: Spec) -> Any:
    """The Optuna storage.

    Raises:
        InputError: It cannot be reached.
    """
    from sqlalchemy.exc import SQLAlchemyError

    url = spec.database
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return import_optuna().storages.RDBStorage(url, engine_kwargs=options)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{spec.file}: storage is {hidden(spec)}, which cannot be opened: {reason}"
        ) from error


def hidden(spec: Spec) -> str:
    """The storage's URL without a password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", spec.database)


def sampler(spec: Spec, seed: int) -> Any:
    samplers = import_optuna().samplers
    if spec.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed)


def pruner(spec: Spec) -> Any:
    """The YAML's pruner.

    Raises:
        InputError: It has no such option.
    """
    pruners = import_optuna().pruners
    options = dict(spec.pruner_options)
    if spec.pruner == "hyperband":
        steps = spec.flat(spec.rows[0]).get(MAX_STEPS)
        options = {"max_resource": steps, "min_resource": max(1, (steps or 1) // 9)} | options
    kind = pruners.MedianPruner if spec.pruner == "median" else pruners.HyperbandPruner
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{spec.file}: pruner: {error}") from error


def distributions(spec: Spec) -> dict[str, Any]:
    """Optuna's form of the YAML's ``search``."""
    kinds, found = import_optuna().distributions, {}
    for key, how in spec.search.items():
        if "choices" in how:
            found[key] = kinds.CategoricalDistribution(how["choices"])
        else:
            whole = all(isinstance(how[end], int) for end in how if end != "log")
            kind = kinds.IntDistribution if whole else kinds.FloatDistribution
            found[key] = kind(**how)
    return found
