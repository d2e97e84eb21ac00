"""Whatever the configuration of a fit, a sweep or a pipeline says, it is accepted or refused in one
line; nothing is trained."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.any_values import MANY, VALUES, accepted_or_refused, changed
from helpers.fit_runs import CONFIG
from ropepp import pipeline
from ropepp.runs.settings import flatten
from ropepp.sweep import config as sweeps
from ropepp.train.estimate import EstimateCLI

BASE = {**CONFIG, "data.corpus": "nowhere", "logs": "logs", "run": "a"}
SWEEP: dict[str, Any] = {
    "name": "s",
    "question": "Why?",
    "base": ["base.yaml"],
    "set": {"trainer.max_steps": 4},
    "variants": {"rope": {"model.position": {"class_path": "RoPE"}}, "ec": None},
    "axes": {"model.network.num_layers": [1, 2]},
    "seeds": [0, 1],
    "baseline": "rope",
    "controls": ["ec"],
    "metric": "validation_loss",
    "sampler": "random",
    "trials": 2,
    "search": {"model.optimizer.lr": {"low": 0.1, "high": 1.0, "log": True}},
    "pruner": {"name": "median"},
    "seed": 0,
    "launcher": "{python} {args}",
    "logs": "logs",
}
PIPELINE: dict[str, Any] = {
    "name": "p",
    "base": ["base.yaml"],
    "set": {"trainer.max_steps": 4},
    "seed": 1,
    "launcher": "{python} {args}",
    "logs": "logs",
    "variants": {"rope": {"model.position": {"class_path": "RoPE"}}, "ec": None},
    "stages": [
        {"name": "one", "config": "base.yaml"},
        {"name": "two", "after": "one", "take": "moments", "set": {"model.optimizer.lr": 0.1},
         "variants": ["ec"]},
    ],
}  # fmt: skip


def flag(key: str, value: Any) -> str:
    as_json = value is None or isinstance(value, dict | list | bool)
    return f"--{key}={json.dumps(value) if as_json else value}"


@cache
def command_line() -> EstimateCLI:
    """The command line of fit, which parses and builds and starts nothing."""
    return EstimateCLI(["fit", *(flag(key, value) for key, value in BASE.items())])


@cache
def whole_settings() -> dict[str, Any]:
    """All settings of a small run, whatever the command line has been told since."""
    cli = EstimateCLI(["fit", *(flag(key, value) for key, value in BASE.items())])
    found: dict[str, Any] = cli.config.fit.as_dict()
    return found


@cache
def keys_of_fit() -> list[str]:
    """All that a small run can be told, the arguments of its classes too."""
    keys = sorted(flatten(whole_settings()))
    assert len(keys) > 100
    return keys


def take(args: list[str]) -> None:
    """What fit does with its arguments before it touches data or devices."""
    cli = command_line()
    cli.parse_arguments(cli.parser, ["fit", *args])
    cli._check_trainer()
    cli.instantiate_classes()
    cli.check()


@pytest.mark.slow
@given(data=st.data())
@settings(MANY, max_examples=40)
def test_any_value_of_any_key_of_fit(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(keys_of_fit()), min_size=1, max_size=2, unique=True))
    given_values = {key: data.draw(VALUES, label=key) for key in keys}
    with accepted_or_refused():
        take([flag(key, value) for key, value in (BASE | given_values).items()])


@pytest.mark.slow
@given(data=st.data())
@settings(MANY, max_examples=40)
def test_any_change_of_a_file_of_fit(data: st.DataObject, tmp_path: Path) -> None:
    whole = whole_settings()
    tree = {key: whole[key] for key in ("model", "data", "trainer", "checkpoint", "guard", "suite")}
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(changed(tree, data.draw)), errors="backslashreplace")
    with accepted_or_refused():
        take([f"--config={file}"])


@given(data=st.data())
@settings(MANY, max_examples=100)
@pytest.mark.parametrize(("load", "content"), [(sweeps.load, SWEEP), (pipeline.load, PIPELINE)])
def test_any_change_of_a_sweep_or_pipeline(
    load: Any, content: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 3}\n")
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(content)))
        other = {**content, key: data.draw(VALUES)}
    else:
        other = changed(content, data.draw)
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(other), errors="backslashreplace")
    with accepted_or_refused():
        found = load(file)
        if isinstance(found, sweeps.SweepConfig):
            assert found.folder.parent == Path(found.logs)
            for row in found.rows:
                found.flat(row)
            found.plan()
        else:
            for variant in found.variants:
                for stage in found.stages_of(variant):
                    assert found.directory(variant, stage.name).parent.parent == found.folder
                    found.arguments(variant, stage)


@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))
    )
)
@settings(MANY, max_examples=80)
@pytest.mark.parametrize("load", [sweeps.load, pipeline.load])
def test_any_bytes_as_a_file(load: Any, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with accepted_or_refused():
        load(file)
