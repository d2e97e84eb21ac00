"""Every key of fit acts or is refused by its name; a run's directory and its YAML are its own."""

import inspect
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from helpers.fit_runs import arguments, finish, fit, start, wait_for_step
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.files import held
from ropepp.model.config import ModelConfig
from ropepp.model.positions import RoPE
from ropepp.model.scale import MatrixScale, ScaleRule
from ropepp.runs.archives import read_archive, write_archive
from ropepp.runs.settings import read_yaml
from ropepp.train.callbacks.run_files import _Dumper
from ropepp.train.lightning_cli import FIXED, RopeppCLI
from ropepp.train.module import LanguageModel
from ropepp.train.optim import AdamW
from ropepp.train.schedules import Cosine

ACT = {  # what Lightning serves as it says, or this project checks elsewhere
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks"),
    *("max_steps", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("num_sanity_val_steps", "enable_progress_bar", "enable_model_summary", "deterministic"),
    *("accumulate_grad_batches", "gradient_clip_val", "benchmark", "inference_mode", "profiler"),
    *("detect_anomaly", "plugins", "default_root_dir"),
}
OTHERS: dict[str, Any] = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "log_every_n_steps"), 3),
    **dict.fromkeys(("limit_train_batches", "val_check_interval", "overfit_batches"), 1),
    **dict.fromkeys(("check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"), 2),
    **dict.fromkeys(("fast_dev_run", "use_distributed_sampler", "sync_batchnorm"), True),
    "enable_autolog_hparams": True,
    "enable_checkpointing": False,
    "max_time": "00:00:01:00",
    "gradient_clip_algorithm": "value",
    "barebones": True,
    "model_registry": "name",
}


def test_every_key_of_the_trainer_acts_or_is_refused() -> None:
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert known == ACT | set(FIXED)
    assert set(OTHERS) == set(FIXED)
    for key, value in [*OTHERS.items(), ("limit_train_batches", 0), ("overfit_batches", 0.5)]:
        cli = SimpleNamespace(options=SimpleNamespace(trainer={key: value}))
        with pytest.raises(InputError, match=rf"trainer\.{key} is {value!r}"):
            RopeppCLI._check_trainer(cli)


SIZES = ModelConfig(
    vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_size=24
)
HALF = MatrixScale(ScaleRule(gain=0.5))
NETWORK: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 1,
    "ffn_size": 32,
    "head_size": 4,
    "norm_eps": 0.5,
    "tied_embeddings": True,
    "qk_norm": True,
    "init_std": 0.1,
    "o_proj": HALF,
    "down_proj": HALF,
}
MODEL: dict[str, Any] = {
    "position": RoPE(theta=100.0),
    "optimizer": AdamW(lr=0.5),
    "schedule": Cosine(),
    "compute_dtype": "bfloat16",
    "compile": True,
    "activation_checkpointing": 1,
    "backend": "reference",
    "z_loss": 0.5,
    "seed": 1,
}


def traits(network: ModelConfig = SIZES, **changes: Any) -> tuple[Any, ...]:
    """What a key of the model may change: the loss and the way in which it is trained."""
    module = LanguageModel(network, **{"position": RoPE(), **changes})
    transformer = module.network
    transformer.to_empty(device="cpu")
    transformer.initialize(module.seed)
    ids = torch.arange(32)[None]
    loss, _ = transformer.loss(ids, ids.roll(-1))
    blocks = list(transformer.blocks())
    return (
        float(loss.detach()), sum(p.numel() for p in transformer.parameters()),
        module.compile_blocks, blocks[0].recompute, blocks[0].self_attn.backend,
        transformer.z_loss, module.optimizer_spec, module.schedule,
    )  # fmt: skip


def test_every_key_of_the_model_acts() -> None:
    assert set(NETWORK) == {field.name for field in fields(ModelConfig)}
    parameters = set(inspect.signature(LanguageModel.__init__).parameters)
    assert set(MODEL) == parameters - {"self", "network"}
    assert traits() == (base := traits())
    for key, value in NETWORK.items():
        assert traits(replace(SIZES, **{key: value})) != base, key
    for key, value in MODEL.items():
        assert traits(**{key: value}) != base, key


@pytest.mark.parametrize("name", ["1e3", "5e12345", "1_000.5", "null", "007", "12:30:45", "1.e1"])
def test_text_that_looks_like_a_number_stays_text(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    content = {"run": name, "lr": 1e-5, "steps": 1000}
    file.write_text(yaml.dump(content, Dumper=_Dumper))
    assert read_yaml(file) == content


def test_one_line_before_any_work(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    twice, latin, blocked = (tmp_path / name for name in ("twice.yaml", "latin.yaml", "file"))
    twice.write_text("trainer: {max_steps: 1}\ntrainer: {max_steps: 2}\n")
    latin.write_bytes(b"# caf\xe9\ntrainer: {max_steps: 1}\n")
    blocked.touch()
    for flag, words in (
        (f"--config={twice}", "twice.yaml: while constructing a mapping"),
        (f"--config={latin}", "latin.yaml: 'utf-8' codec"),
        ("--seed_everything=-1", "seed_everything is -1"),
        (f"--seed_everything={2**70}", f"seed_everything is {2**70}"),
        (f"--logs={blocked}", f"{blocked}/default/bad"),
    ):
        assert main([*arguments(corpus, tmp_path, "bad"), flag]) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert words in error[-1]
        assert not any("Traceback" in line for line in error)
    assert main(["validate", *arguments(corpus, tmp_path, "bad")[1:], f"--logs={blocked}"]) == 2
    assert f"{blocked}/default/bad cannot be written" in capfd.readouterr().err
    assert not list(tmp_path.rglob("bad"))


def test_a_directory_in_use_is_refused(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "default" / "run" / ".fit.lock"):
        assert main(arguments(corpus, tmp_path, "run")) == 2
    assert "default/run is in use by process " in capfd.readouterr().err


def test_what_is_refused_leaves_the_configuration_of_the_run(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sharded checkpoints too, which are restored when all else is done."""
    begun = {"trainer__max_steps": 1, "trainer__strategy": "fsdp2", "model__position": "RoPE"}
    run = fit(corpus, tmp_path, "run", **begun)
    (run / "result.json").unlink()
    before = (run / "config.yaml").read_bytes()
    changes = {**begun, "trainer__max_steps": 2, "model__position": "RoPEppEC", "resume": "auto"}
    assert main(arguments(corpus, tmp_path, "run", **changes)) == 2
    assert "o_proj.weight' is (32, 32); expected (32, 64)" in capfd.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_what_a_resume_may_not_change(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = {"trainer__max_steps": 3, "model__position": "RoPE"}
    fit(corpus, tmp_path, "run", **begun)
    longer = {**begun, "trainer__max_steps": 4, "resume": "auto"}
    for size in (4, 12, 20, 24):
        changes = {**longer, "data__global_batch_size": size}
        assert main(arguments(corpus, tmp_path, "run", **changes)) == 2
        assert f"global_batch_size is {size}, the checkpoint's was 8" in capfd.readouterr().err
    with pytest.warns(UserWarning, match="documents not masked here and was"):
        fit(corpus, tmp_path, "run", **longer, data__mask_documents=False)
    newest = tmp_path / "default" / "run" / "checkpoints" / "step-0000004.ckpt"
    content, _ = read_archive(newest, newest, mapped=False)
    del content["callbacks"]
    write_archive(content, bare := tmp_path / "bare.ckpt")
    changes = {**begun, "trainer__max_steps": 5, "ckpt_path": str(bare)}
    assert main(arguments(corpus, tmp_path, "other", **changes)) == 2
    assert "bare.ckpt has no callbacks" in capfd.readouterr().err
    text, other = tmp_path / "other.txt", tmp_path / "other"
    text.write_text("\n\n".join(f"{number} stones by the river" * 40 for number in range(60)))
    assert main(["prepare", str(text), f"--out={other}", "--tokenizer=bytes"]) == 0
    with pytest.warns(UserWarning, match="whose text is not the checkpoint's"):
        fit(other, tmp_path, "run", **{**longer, "trainer__max_steps": 5})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save(
    corpus: Path, tmp_path: Path, number: signal.Signals
) -> None:
    changes = {"trainer__max_steps": 10**6, "checkpoint__every_n_steps": 0}
    process, run = start(corpus, tmp_path, "run", **changes), tmp_path / "default" / "run"
    wait_for_step(process, run, 3)
    process.send_signal(number)
    assert "--resume auto goes on" in finish(process, code=75)
    assert list((run / "checkpoints").glob("step-*.ckpt"))
    assert not (run / ".fit.lock").exists()


def test_pipes_are_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading one that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "result.json")
    pipe = str(tmp_path / "pipe.yaml")
    for args in (["fit", "--config", pipe], ["estimate", pipe], ["sweep", "init", pipe]):
        assert main(args) == 2
        assert "pipe.yaml" in capsys.readouterr().err
    assert main(["results", str(tmp_path)]) == 2
    assert "result.json" in capsys.readouterr().err


def test_a_list_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    file = str(tmp_path / "list.yaml")
    for args in (["fit", "--config", file], ["estimate", file]):
        assert main(args) == 2
        assert "list.yaml is no configuration: it has no keys" in capsys.readouterr().err
