"""How a run ends and what its folder says of it: numbers that are not finite, damage, a name of its
own, where it began."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.fit_runs import arguments, fit
from ropepp.cli import main
from ropepp.files import run_folder

SHORT: dict[str, Any] = {"trainer__max_steps": 3, "data__validate_every_n_steps": 0}


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {**SHORT, "model__optimizer__lr": 1e10}
    assert main(arguments(corpus, tmp_path, "run", **wild)) == 76
    assert "validation/loss is nan" in capsys.readouterr().err
    run = tmp_path / "default/run"
    result = json.loads((run / "result.json").read_text(), parse_constant=no_constant)
    assert result["validation_loss"] is None
    assert "validation/loss is nan" in result["diverged"]
    assert main(arguments(corpus, tmp_path, "run", **wild, resume="auto")) == 76
    assert "is finished: validation/loss is nan" in capsys.readouterr().err
    ckpt = {"ckpt_path": "last", **wild}
    assert main(["validate", *arguments(corpus, tmp_path, "run", **ckpt)[1:]]) == 76
    json.loads((run / "validate.json").read_text(), parse_constant=no_constant)


def test_a_damaged_or_missing_result_is_made_again(corpus: Path, tmp_path: Path) -> None:
    """The same, without a step: the last loss is in the checkpoint."""
    file = fit(corpus, tmp_path, "run", **SHORT) / "result.json"
    whole = json.loads(file.read_text())
    for content in (b'{"steps": 3', None):
        file.unlink() if content is None else file.write_bytes(content)
        if content is None:
            fit(corpus, tmp_path, "run", **SHORT, resume="auto")
        else:
            with pytest.warns(UserWarning, match=r"result.json is damaged"):
                fit(corpus, tmp_path, "run", **SHORT, resume="auto")
            assert file.with_name("result.json.damaged").read_bytes() == content
        again = json.loads(file.read_text())
        for key in ("steps", "train_loss", "validation_loss", "evaluation", "tokens"):
            assert again[key] == whole[key], key


def test_where_a_run_begins(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit(corpus, tmp_path, "first", **SHORT) / "checkpoints/step-0000003.ckpt"
    both = {**SHORT, "init_from": first, "ckpt_path": first}
    for more in ({}, {"resume": "auto"}):
        assert main(arguments(corpus, tmp_path, "run", **both, **more)) == 2
        assert f"ckpt_path is {first} and init_from is {first}" in capsys.readouterr().err
    begun = {**SHORT, "init_from": first, "resume": "auto"}
    fit(corpus, tmp_path, "run", **begun)
    assert "going on" not in capsys.readouterr().out
    fit(corpus, tmp_path, "run", **{**begun, "trainer__max_steps": 4})
    assert f"run/checkpoints/step-0000003.ckpt, not from {first}" in capsys.readouterr().out


def test_runs_that_begin_in_one_second(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20261127-120000")
    args = [arg for arg in arguments(corpus, tmp_path, "run", **SHORT) if arg != "--run=run"]
    assert main(args) == main(args) == 0
    names = sorted(path.name for path in (tmp_path / "default").iterdir())
    assert len(names) == 2
    assert all(name.startswith("20261127-120000-") for name in names)
    assert "ROPEPP_RUN" not in os.environ


def test_links_within_and_out_of_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "disk/logs/exp/b").mkdir(parents=True)
    (tmp_path / "logs").symlink_to(tmp_path / "disk/logs")
    (tmp_path / "logs/exp/a").symlink_to("b")
    (tmp_path / "logs/linked").symlink_to(tmp_path / "disk")
    for experiment, run in (("exp", "a"), ("exp", "new"), ("exp", "b/c"), ("linked", "x")):
        found = run_folder(tmp_path / "logs", experiment, run)
        assert found == tmp_path / "logs" / experiment / run
    (tmp_path / "logs/exp/out").symlink_to(tmp_path)
    for run in ("out", "out/x"):
        with pytest.raises(ValueError, match="is a link out of"):
            run_folder(tmp_path / "logs", "exp", run)
