"""Pipelines: what they say, the paper's numbers in the shipped ones, and one that is killed."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import warm_python
from helpers.dry_cli import DryCLI
from helpers.fit_runs import curve
from helpers.golden_data import REPOSITORY
from ropepp import pipeline as pipeline_module
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.pipeline import load, run, write_table
from ropepp.runs.process import writers

PIPELINES = REPOSITORY / "configs" / "pipeline"
# PAPER's table: tokens a step, last step, schedule, where it is at the end.
PAPER = {
    "pretrain": (4096, 128, 90_000, "Constant"),
    "decay": (4096, 128, 100_000, "WSD"),
    "long_ntk": (32768, 16, 10_000, "Cosine"),
    "long_pi": (32768, 16, 10_000, "Cosine"),
    "long_yarn": (32768, 16, 10_000, "Cosine"),
}


@pytest.mark.parametrize("size", ["376m", "776m", "1.5b"])
def test_the_papers_stages(size: str, tmp_path: Path) -> None:
    """Every stage on the meta device, with the published numbers; of most variants the last."""
    pipeline = load(PIPELINES / f"paper_{size}.yaml")
    found = {(name, s.name) for name in pipeline.variants for s in pipeline.stages_of(name)}
    assert found >= {(name, stage) for name in ("RoPE", "EC", "EH") for stage in PAPER}
    assert {name for name, _ in found} == {"RoPE", "EC", "EH", "FoPE", "Pythia", "ALiBi", "NoPE"}
    for name in pipeline.variants if size == "376m" else ("EC", "ALiBi"):
        stages = pipeline.stages_of(name)
        for stage in stages if name in ("EC", "ALiBi") else stages[-1:]:
            arguments = pipeline.arguments(name, stage)
            cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--logs={tmp_path}"]
            cli = DryCLI(["fit", *arguments, *cpu])
            length, rows, steps, schedule = PAPER[stage.name]
            assert cli.datamodule.sequence_length == length
            assert cli.datamodule.global_batch_size == rows
            assert cli.trainer.max_steps == steps
            assert type(cli.model.schedule).__name__ == schedule
            multiplier = cli.model.schedule.multiplier
            assert multiplier(499, steps) < 1 <= multiplier(500, steps)
            assert cli.model.optimizer_spec.lr == 5e-4
            assert cli.model.optimizer_spec.betas == (0.95, 0.99)
            position = cli.model.network.position
            if stage.name == "long_ntk":
                assert position.theta == 5e5
            if stage.name == "long_pi":
                assert (position.theta, position.scaling.factor) == (1e4, 8.0)
            if stage.name == "long_yarn":
                assert (position.scaling.factor, position.scaling.original_length) == (32.0, 4096)
    decay = next(s for s in pipeline.stages if s.name == "decay")
    assert (decay.after, decay.take) == ("pretrain", "progress")
    cli = DryCLI(["fit", *pipeline.arguments("EC", decay), *cpu])
    assert cli.model.schedule.multiplier(89_999, 100_000) == 1.0
    assert cli.model.schedule.multiplier(95_000, 100_000) == pytest.approx(0.5)
    assert cli.model.schedule.multiplier(100_000, 100_000) == pytest.approx(0.0)


TINY: dict[str, Any] = {
    "model.network": {
        "vocab_size": 257, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "ffn_size": 48,
    },
    "model.optimizer.lr": 0.01,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "metrics.every_n_steps": 1,
    "checkpoint.every_n_steps": 4,
    "data.validate_every_n_steps": 0,
    "data.global_batch_size": 8,
    "data.micro_batch_size": 4,
}  # fmt: skip


def write_pipeline(folder: Path, corpus: Path, logs: Path) -> Path:
    base = {**TINY, "data.corpus": str(corpus), "data.sequence_length": 32}
    nested: dict[str, Any] = {}
    for key, value in base.items():
        at = nested
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    nested["data"] = {"class_path": "CorpusDataModule", "init_args": nested["data"]}
    nested["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    nested["model"]["position"] = {"class_path": "RoPEppEC"}
    (folder / "base.yaml").write_text(yaml.safe_dump(nested))
    content = {
        "name": "tiny",
        "base": ["base.yaml"],
        "logs": str(logs),
        "variants": {"EC": {"model.position": {"class_path": "RoPEppEC"}}},
        "stages": [
            {"name": "pretrain", "set": {"trainer.max_steps": 30}},
            {
                "name": "decay",
                "after": "pretrain",
                "take": "everything",
                "set": {
                    "trainer.max_steps": 40,
                    "model.schedule": {"class_path": "WSD", "init_args": {"decay_steps": 10}},
                },
            },
            {
                "name": "long",
                "after": "decay",
                "take": "moments",
                "set": {
                    "trainer.max_steps": 30,
                    "data.sequence_length": 64,
                    "model.position.init_args.theta": 50000.0,
                },
            },
        ],
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def start(file: Path) -> subprocess.Popen[str]:
    command = [warm_python.python(), "-m", "ropepp.cli", "pipeline", str(file)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    )


def wait_for(file: Path, step: int) -> None:
    for _ in range(6000):
        text = file.read_text() if file.exists() else ""
        if f'"step": {step},' in text:
            return
        time.sleep(0.02)
    raise AssertionError(f"{file} did not reach step {step}")


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_stages_survive_kills(corpus: Path, tmp_path: Path) -> None:
    """The driver is killed and leaves its fit; the next adopts it; then everything is asked to
    end; the result is the undisturbed pipeline's."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "tried").mkdir()
    whole = tmp_path / "logs-whole" / "tiny" / "EC"
    tried = tmp_path / "logs-tried" / "tiny" / "EC"
    assert (
        main(["pipeline", str(write_pipeline(tmp_path / "whole", corpus, whole.parent.parent))])
        == 0
    )

    file = write_pipeline(tmp_path / "tried", corpus, tried.parent.parent)
    process = start(file)
    wait_for(tried / "pretrain" / "metrics.jsonl", 9)
    process.kill()
    process.communicate()
    orphan = list(writers(tried / "pretrain" / "fit.log"))
    for pid in orphan:  # so that it lives when the next driver has read its settings
        os.kill(pid, signal.SIGSTOP)
    process = start(file)
    assert process.stdout is not None
    said = next(line for line in process.stdout if "EC/pretrain" in line)
    assert "EC/pretrain goes on without its driver: adopted" in said
    for pid in orphan:
        os.kill(pid, signal.SIGCONT)
    wait_for(tried / "long" / "metrics.jsonl", 5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert not (tried / "long" / "result.json").exists()
    assert main(["pipeline", str(file)]) == 0

    for stage in ("pretrain", "decay", "long"):
        assert curve(tried / stage) == curve(whole / stage)
    log = (tried / "pretrain" / "fit.log").read_text()
    assert log.count("\n$ ") == 1  # not run twice
    decay = curve(whole / "decay")
    assert [line["step"] for line in decay if "train/loss" in line] == list(range(31, 41))
    assert decay[0]["train/tokens"] == 31 * 8 * 32
    assert decay[0]["train/learning_rate"] == 0.01 > decay[-2]["train/learning_rate"]
    table = (whole.parent / "pipeline.md").read_text()
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| EC")] == [
        *("EC/pretrain", "EC/decay", "EC/long")
    ]
    long = json.loads((whole / "long" / "result.json").read_text())
    assert long["hyper_parameters"]["position"]["init_args"]["theta"] == 50000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages is missing or empty"),
        ({"speed": 1}, "unknown key speed; allowed: name, base"),
        ({"stages": [{"name": "a", "variants": []}]}, "stages[0].variants is empty"),
        ({"stages": [{"name": "a", "take": "moments"}]}, "stages[0].take is 'moments', but there"),
        (
            {"stages": [{"name": "a", "take": "all"}]},
            "take is 'all'; allowed: everything, progress, weights",
        ),
        ({"variants": {"pipeline.md": None}}, "'pipeline.md'; allowed: letters"),
        ({"stages": [{"name": "a.yaml"}]}, "stages[0].name is 'a.yaml'; allowed: letters"),
        ({"stages": [{"name": "../a"}]}, "stages[0].name is '../a'; allowed: letters"),
        ({"like": "tiny.yaml"}, "like is tiny.yaml, which has like itself"),
        ({"seed": 2**70}, f"seed is {2**70}; allowed: 0 to"),
        ({"stages": [{"name": "a", "after": "b"}]}, "after is 'b'; allowed: none, it is the first"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "two stages have the name 'a'"),
        ({"stages": [{"name": "a", "config": "x.yaml"}]}, "'x.yaml', which is no file"),
        ({"stages": [{"name": "a", "variants": ["RoPE"]}]}, "variants has 'RoPE'; allowed: EC"),
        ({"launcher": "python x"}, "it needs {args}"),
        ({"like": "x.yaml"}, "x.yaml is no file"),
        ({"set": {"run": "x"}}, "set.run: config, experiment, run"),
        ({"seed": "one"}, "seed is 'one'; allowed: a whole number"),
    ],
)
def test_bad_pipelines(corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_pipeline(tmp_path, corpus, tmp_path)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(InputError) as error:
        load(file)
    assert message in str(error.value)
    assert str(file.parent) in str(error.value)


def test_what_earlier_stages_have_left(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged result stops no table; nothing goes on from weights that are no numbers; names and
    links lead nowhere else."""
    file = write_pipeline(tmp_path, corpus, tmp_path / "logs")
    stage = tmp_path / "logs/tiny/EC/pretrain"
    stage.mkdir(parents=True)
    (stage / "result.json").write_bytes(b'{"steps"')
    assert write_table(load(file)).read_text() == "# tiny\n\n"
    assert "EC/pretrain" in capsys.readouterr().err
    (stage / "result.json").write_text('{"validation_loss": null, "diverged": "loss is nan"}')
    assert main(["pipeline", str(file)]) == 76
    assert "EC/pretrain diverged: loss is nan" in capsys.readouterr().err
    (tmp_path / "logs/tiny/EC/decay").symlink_to(tmp_path)
    with pytest.raises(InputError, match="EC/decay is a link out of"):
        load(file).directory("EC", "decay")


def test_a_stage_that_is_done_tells_what_was_changed_since(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not run again, neither by itself nor silently with what it had before."""
    monkeypatch.setattr(pipeline_module, "check", lambda *_: None)  # fit knows no key with numbers
    file = write_pipeline(tmp_path, corpus, tmp_path / "logs")
    done = tmp_path / "logs/tiny/EC/pretrain/result.json"
    fit = tmp_path / "fit.py"
    fit.write_text(f"open({str(done)!r}, 'x').write('{{\"validation_loss\": 1.0}}')")
    content = yaml.safe_load(file.read_text())
    content |= {"launcher": f"{{python}} {fit} {{args}}", "stages": content["stages"][:1]}
    content["set"] = {"trainer.logger": {1: 2}}  # which is '1' in JSON

    def said(stages: list[dict[str, Any]]) -> str:
        file.write_text(yaml.safe_dump(content | {"stages": stages}))
        run(load(file), ["EC"])
        return capsys.readouterr().out

    assert "EC/pretrain: begins" in said(content["stages"])
    assert said(content["stages"]) == "EC/pretrain: done before\n"
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("lr: 0.01", "lr: 0.02"))
    assert "optimizer.init_args.lr was 0.01 and is 0.02); to run" in said(content["stages"])
    set_ = {"trainer.max_steps": 60}
    out = said([{**content["stages"][0], "set": set_, "variants": ["EC"]}])
    assert "stage.set.trainer.max_steps was 30 and is 60); to run it anew, delete" in out
    assert "variants" not in out


def test_dry_prints_commands_that_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", str(PIPELINES / "small.yaml"), "--dry", "--variants", "EH"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.partition("  #")[0])[2:]
        cli = DryCLI(["fit", *words, f"--logs={tmp_path}"])
        assert type(cli.model.network.position).__name__ == "RoPEppEH"
    assert os.listdir(tmp_path) == []


def test_a_launcher_that_is_no_program_is_refused(corpus: Path, tmp_path: Path) -> None:
    file = write_pipeline(tmp_path, corpus, tmp_path)
    file.write_text(f"{file.read_text()}launcher: nonesuch-program {{args}}\n")
    pipeline = load(file)
    with pytest.raises(InputError, match="'nonesuch-program', which is no program here"):
        run(pipeline, list(pipeline.variants))
    assert not pipeline.folder.exists()
