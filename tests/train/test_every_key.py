"""A walk over all keys of fit besides those of the trainer and the model: each acts, and a value
that would not is refused by its name."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.dry_cli import DryCLI
from helpers.fit_runs import arguments, curve, fit, metrics
from ropepp.cli import main
from ropepp.data.loading.datamodule import CorpusDataModule, RowsDataModule
from ropepp.data.packing.best_fit import BestFit
from ropepp.data.recall.task import RecallDataModule
from ropepp.train.callbacks.checkpoint import StepCheckpoint
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.callbacks.profile import StepProfile
from ropepp.train.callbacks.suite import SuiteEvaluation
from ropepp.train.guard import StepGuard
from ropepp.train.lightning_cli import run_options

STEPS: dict[str, Any] = {"trainer__max_steps": 4, "data__validate_every_n_steps": 0}
PARTS: dict[str, Callable[..., Any]] = {
    "checkpoint": StepCheckpoint,
    "metrics": Metrics,
    "guard": StepGuard,
    "profile": StepProfile,
    "suite": SuiteEvaluation,
}
# Another value than the default's of each key, and values that are refused.
CALLBACKS: dict[str, tuple[Any, list[Any]]] = {
    "checkpoint.every_n_steps": (2, [-1, "often"]),
    "checkpoint.keep": (0, [-1]),
    "metrics.every_n_steps": (2, [0, -1]),
    "metrics.peak_tflops": (1.5, [0, -2]),
    "guard.spike_factor": (3.0, [1, 0]),
    "guard.stop_after": (2, [0]),
    "profile.steps": (1, [-1]),
    "profile.first_step": (2, [-1]),
    "suite.every_n_steps": (2, [-1, 1]),  # the last without lengths
    "suite.corpus": ("CORPUS", []),
    "suite.lengths": ([16], [[0], ["a"]]),
    "suite.rows": (3, [0]),
}
SIZES: dict[str, tuple[Any, list[Any]]] = {
    "sequence_length": (16, [0, -1]),
    "global_batch_size": (4, [0, 6]),
    "micro_batch_size": (2, [0, 3]),
    "validate_every_n_steps": (2, [-1]),
    "num_workers": (1, [-1, 65]),
    "seed": (3, [-1]),
}
CORPUS: dict[str, tuple[Any, list[Any]]] = {
    "corpus": ("CORPUS", ["no/such/corpus"]),
    "packing": ("BestFit", ["Tight"]),
    "mask_documents": (False, ["maybe"]),
    "validation_rows": (1, [0, -1]),
    "extrapolation": ([2], [[1]]),
    "verify": (True, []),
}
RECALL: dict[str, tuple[Any, list[Any]]] = {
    "pairs": (3, [0]),
    "vocab_size": (96, [3]),
    "max_distance": (20, [1]),
    "train_rows": (64, [0]),
    "validation_rows_per_length": (4, [0]),
    "lengths": ([1, 2], [[2]]),
}
OPTIONS: dict[str, list[Any]] = {
    "seed_everything": [-1, 2**70, "one"],
    "experiment": ["", "..", "a/b", "a.", ".a"],
    "run": ["", "..", "../../evil", "/tmp/evil", "a//b", "a/", "a\\b", "a.", "$HOME", "a\nb"],
    "logs": ["FILE"],
    "resume": ["always"],
    "init_from": ["no/such/model"],
    "init_optimizer": [True],  # without init_from
    "fresh_optimizer": [True],  # without ckpt_path
}


def parameters(kind: Callable[..., Any]) -> set[str]:
    function = kind.__init__ if inspect.isclass(kind) else kind
    return set(inspect.signature(function).parameters) - {"self", "sizes"}


def test_the_tables_have_every_key() -> None:
    for name, kind in PARTS.items():
        own = {key.partition(".")[2] for key in CALLBACKS if key.startswith(f"{name}.")}
        assert own == parameters(kind), name
    assert set(SIZES) == parameters(RowsDataModule)
    assert set(CORPUS) == parameters(CorpusDataModule)
    assert set(RECALL) == parameters(RecallDataModule)
    assert set(OPTIONS) == parameters(run_options)


def flags(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in values.items()}


def test_every_key_arrives(corpus: Path, tmp_path: Path) -> None:
    """At the callback, which is attached, and at the data module."""
    values = {
        key: str(corpus) if value == "CORPUS" else value for key, (value, _) in CALLBACKS.items()
    }
    data = {key: value for key, (value, _) in {**CORPUS, **SIZES}.items() if key != "corpus"}
    seed = data.pop("seed")
    given = flags({**values, **{f"data.{key}": value for key, value in data.items()}})
    cli = DryCLI(arguments(corpus, tmp_path, "run", **given, seed_everything=seed))
    for key, value in values.items():
        part, _, name = key.partition(".")
        (callback,) = (one for one in cli.trainer.callbacks if type(one) is PARTS[part])
        assert getattr(callback, name) == value, key
    assert cli.datamodule.seed == cli.model.seed == seed
    assert cli.datamodule.packing == BestFit()
    for key, value in data.items():
        assert key == "packing" or getattr(cli.datamodule, key) == value, key
    recall = {key: value for key, (value, _) in RECALL.items()}
    given = flags({f"data.{key}": value for key, value in recall.items()})
    cli = DryCLI(
        arguments(corpus, tmp_path, "run", **given, data="RecallDataModule", data__corpus=None)
    )
    for key, value in recall.items():
        assert getattr(cli.datamodule, key) == value, key


@pytest.mark.extra
def test_values_that_would_not_act_are_refused(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    refused = {key: values for key, (_, values) in CALLBACKS.items()}
    refused |= {f"data.{key}": values for key, (_, values) in {**CORPUS, **SIZES}.items()}
    refused |= OPTIONS
    for key, values in refused.items():
        for value in values:
            given = flags({key: tmp_path / "file" if value == "FILE" else value})
            if key == "data.seed":
                given = {"seed_everything": value}
            changes = {**STEPS, **given}
            args = arguments(
                corpus, changes.pop("logs", tmp_path), changes.pop("run", "run"), **changes
            )
            assert main(args) == 2, (key, value)
            said = capfd.readouterr().err.strip().splitlines()
            assert said[-1].startswith("error: "), (key, value, said)
            names = (key.rpartition(".")[2], f"{key.partition('.')[0]}.", str(value), "/file")
            assert any(name in said[-1] for name in names), (key, value, said)
            assert not any("Traceback" in line for line in said)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(tmp_path.parent.rglob("evil"))


def test_what_the_callbacks_do(corpus: Path, tmp_path: Path) -> None:
    plain = fit(corpus, tmp_path, "plain", **STEPS)
    some = {"checkpoint.every_n_steps": 1, "checkpoint.keep": 3, "metrics.every_n_steps": 2}
    some |= {"metrics.peak_tflops": 1.0, "profile.steps": 1, "profile.first_step": 1}
    some |= {"suite.every_n_steps": 4, "suite.lengths": [16], "suite.corpus": str(corpus)}
    run = fit(corpus, tmp_path, "run", **STEPS, **flags(some))
    saved = sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))
    assert saved == [f"step-{step:07d}.ckpt" for step in (2, 3, 4)]
    assert len(list((plain / "checkpoints").glob("*.ckpt"))) == 1
    logged = [line for line in metrics(run) if "train/loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    assert all("utilisation/mfu" in line for line in logged)
    assert not any("utilisation/mfu" in line for line in metrics(plain))
    assert (run / "profile/rank-0.json").exists()
    assert [line["step"] for line in metrics(run) if "suite/loss_16" in line] == [4]
    wild = {"guard__stop_after": 2, "model__optimizer__lr": 1e30}
    assert main(arguments(corpus, tmp_path, "wild", **STEPS, **wild)) == 76


def test_what_the_data_module_does(corpus: Path, tmp_path: Path) -> None:
    plain = fit(corpus, tmp_path, "plain", **STEPS)
    same = fit(corpus, tmp_path, "same", **STEPS, data__num_workers=1, data__micro_batch_size=2)
    losses = [
        [line["train/loss"] for line in curve(run) if "train/loss" in line] for run in (plain, same)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    result = json.loads((plain / "result.json").read_text())
    for number, (key, value) in enumerate(
        {"sequence_length": 16, "packing": "BestFit", "mask_documents": False}.items()
    ):
        run = fit(corpus, tmp_path, f"other-{number}", **STEPS, **{f"data__{key}": value})
        assert curve(run) != curve(plain), key
    changes = {
        "data__extrapolation": [2],
        "data__validate_every_n_steps": 2,
        "data__validation_rows": 1,
    }
    run = fit(corpus, tmp_path, "validated", **{**STEPS, **changes}, seed_everything=1)
    assert [line["step"] for line in metrics(run) if "validation/loss" in line] == [2, 4]
    other = json.loads((run / "result.json").read_text())
    assert "validation_2x/loss" in other["evaluation"]
    assert "validation_2x/loss" not in result["evaluation"]
    first = [next(line for line in curve(one) if "train/loss" in line) for one in (plain, run)]
    assert first[0]["train/loss"] != first[1]["train/loss"]  # the seed
