"""Runs through the command line, start to end."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from helpers.fit_runs import arguments, curve, fit, metrics
from ropepp.cli import main
from ropepp.commands.fit import main as run_command
from ropepp.model.flops import training_flops
from ropepp.train.module import LanguageModel


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "first")


def test_run_directory(finished: Path) -> None:
    names = {path.name.split(".tfevents")[0] for path in finished.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "events.out", "checkpoints", "result.json"}
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step-0000015.ckpt", "step-0000020.ckpt"]


def test_what_is_logged(finished: Path) -> None:
    train = [line for line in metrics(finished) if "train/loss" in line]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert set(train[0]) == {
        *("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"),
        *("train/skipped_steps", "utilisation/tokens_per_second"),
        *("utilisation/tokens_per_second_per_device", "utilisation/model_tflops_per_second"),
        *("utilisation/data_wait_share", "utilisation/peak_memory_gb"),
    }
    assert [line["train/tokens"] for line in train] == [8 * 32 * n for n in range(1, 21)]
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    validation = [line for line in metrics(finished) if "validation/loss" in line]
    assert [line["step"] for line in validation] == [10, 20]
    for line in validation:
        want = torch.tensor(line["validation/loss"]).exp().item()
        assert line["validation/perplexity"] == pytest.approx(want)
        assert 0 < line["validation/accuracy"] < 1


def test_result(finished: Path, corpus: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    last = [line for line in metrics(finished) if "validation/loss" in line][-1]
    assert result["validation_loss"] == pytest.approx(last["validation/loss"])
    assert result["variant"] == "RoPEppEC"
    assert result["steps"] == 20
    assert result["tokens"] == 20 * 8 * 32
    assert result["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    checkpoint = finished / "checkpoints" / "step-0000020.ckpt"
    model = LanguageModel.load_from_checkpoint(checkpoint, weights_only=True)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    flops = training_flops(model.network, 32, 32 * 33 // 2) / 32
    assert result["training_flops_per_token"] == flops


def test_the_loss_is_the_mean_over_all_targets(corpus: Path, tmp_path: Path) -> None:
    """A step's loss and gradient do not depend on how its rows are cut into micro-batches."""
    changes = {"trainer__max_steps": 6, "data__sequence_length": 64}
    whole = fit(corpus, tmp_path, "whole", data__micro_batch_size=8, **changes)
    parts = fit(corpus, tmp_path, "parts", data__micro_batch_size=1, **changes)
    for a, b in zip(curve(whole), curve(parts), strict=True):
        assert a == pytest.approx(b, rel=2e-4), (a, b)


def test_a_run_repeats_from_its_config_bit_for_bit(finished: Path, corpus: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["model"]["position"]["init_args"]["theta"] == 10000.0
    code = main(["fit", "--config", str(finished / "config.yaml"), "--run", "second", "--debug"])
    assert code == 0
    assert curve(finished.parent / "second") == curve(finished)


def test_seeds_change_weights_and_order(finished: Path, corpus: Path, tmp_path: Path) -> None:
    other = fit(corpus, tmp_path, "other", seed_everything=1, trainer__max_steps=2)
    assert curve(other)[0]["train/loss"] != curve(finished)[0]["train/loss"]


def test_a_finished_run_is_not_overwritten(
    finished: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, finished.parent.parent, "first")) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_validate_test_and_predict(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    result = json.loads((finished / "result.json").read_text())
    common = [f"--config={finished}/config.yaml", "--ckpt_path=last", "--debug"]
    for command, stage in (("validate", "validation"), ("test", "test")):
        assert main([command, *common]) == 0
        written = json.loads((finished / f"{command}.json").read_text())
        assert written[f"{stage}/loss"] == pytest.approx(result["validation_loss"], abs=1e-6)
        assert f"{stage}/loss" in capsys.readouterr().out
    assert main(["predict", *common]) == 0
    total = count = 0.0
    for path in sorted((finished / "predictions").iterdir()):
        with np.load(path) as arrays:
            total += float(arrays["nll"].sum())
            count += int((arrays["targets"] != -100).sum())
    assert total / count == pytest.approx(result["validation_loss"], abs=1e-5)


def test_results_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert main(["results", str(finished.parent)]) == 0
    out = capsys.readouterr().out
    assert f"| first | RoPEppEC | 0 | {result['parameters']:,} | 128 |" in out
    assert "Smoke test: one seed" in out
    assert main(["results", str(finished / "checkpoints")]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished / "checkpoints" / "step-0000020.ckpt"
    changes = {"ckpt_path": checkpoint, "model__position": "RoPE"}
    assert main(arguments(corpus, tmp_path, "other", **changes)) == 2
    assert "the checkpoint's model.position is" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_the_command_line_wins_over_a_checkpoint_and_says_so(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = finished / "checkpoints" / "step-0000015.ckpt"
    with pytest.warns(UserWarning, match=r"model.optimizer is .*0.5.* in the checkpoint"):
        run = fit(corpus, tmp_path, "other", ckpt_path=checkpoint, **{"model__optimizer.lr": 0.5})
    assert curve(run)[0]["train/learning_rate"] == 0.5


@pytest.mark.parametrize("missing", ["", "processor has no bfloat16 instructions"])
def test_slow_bfloat16_is_said(
    missing: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropepp.train.module.no_bfloat16", lambda device: missing)
    changes = {"model.compute_dtype": "bfloat16", "trainer.max_steps": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(corpus, tmp_path, "half", **changes)
    said = [str(warning.message) for warning in caught if "compute_dtype" in str(warning.message)]
    assert len(said) == bool(missing)
    assert all(f"this {missing}" in text for text in said)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {}),
    ],
)
def test_gpu_memory_unless_it_was_chosen(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: dict[str, str]
) -> None:
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("ropepp.train.lightning_cli.main", lambda args: None)
    run_command(["fit"])
    for name in ("GOMP_SPINCOUNT", "ROPEPP_PARENT"):
        environment.pop(name)
    assert environment == given | found


def test_a_run_leaves_no_place_among_processes_behind(corpus: Path, tmp_path: Path) -> None:
    """With one in the environment, two processes that are started from here would never meet."""
    before = set(os.environ)
    fit(corpus, tmp_path, "sharded", trainer__strategy="fsdp2")
    places = {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}
    assert not places & (set(os.environ) - before)
