"""``ropepp import`` and ``ropepp export`` around real runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from helpers.corpora import run as run_prepare
from helpers.fit_runs import arguments, fit, metrics
from ropepp.cli import main
from ropepp.commands import export_model, import_model
from ropepp.errors import InputError
from ropepp.interop.export import export
from ropepp.interop.saved import import_checkpoint, open_model
from ropepp.runs.checkpoints import describe
from ropepp.train.module import LanguageModel

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "first", trainer__max_steps=5)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "model"
    export_model.main([str(run), str(out)])
    return out


def test_a_run_comes_out_with_its_figures(run: Path, folder: Path, corpus: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    card = (folder / "README.md").read_text()
    for shown in (
        "RoPEppEC",
        f"{result['parameters']:,}",
        f"{result['kv_cache_bytes_per_token']:,}",
        f"{result['tokens']:,}",
        f"{result['validation_loss']:.4f}",
        result["commit"],
        corpus.name,
        "An ordinary Llama",
    ):
        assert f"{shown}" in card
    assert str(corpus.parent) not in card
    settings = json.loads((folder / "config.json").read_text())
    assert settings["max_position_embeddings"] == 32
    assert settings["eos_token_id"] == 256  # the corpus' own tokenizer
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "checksums.json"),
    }


def test_figures_of_other_weights_are_not_shown(run: Path, tmp_path: Path) -> None:
    first = sorted((run / "checkpoints").iterdir())[0]
    assert open_model(first).step == 5
    result = run / "result.json"
    content = json.loads(result.read_text())
    try:
        result.write_text(json.dumps({**content, "steps": 6}))
        export_model.main([str(first), str(tmp_path / "out")])
    finally:
        result.write_text(json.dumps(content))
    assert "validation loss" not in (tmp_path / "out" / "README.md").read_text()


def test_an_import_validates_and_trains_on(
    run: Path, folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.ckpt"
    import_model.main([str(folder), str(file)])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["position"]["class_path"].endswith(".RoPEppEC")
    model_yaml = tmp_path / "model.yaml"
    model_yaml.write_text(yaml.safe_dump(printed))
    args = arguments(corpus, tmp_path / "logs", "again", config=model_yaml, trainer__max_steps=2)
    kept = [a for a in args[1:] if not a.startswith(("--model.network", "--model.position"))]
    assert main(["validate", *kept, f"--ckpt_path={file}", "--debug"]) == 0
    found = json.loads((tmp_path / "logs/default/again/validate.json").read_text())
    result = json.loads((run / "result.json").read_text())
    assert found["validation/loss"] == pytest.approx(result["validation_loss"], abs=1e-6)
    assert main(["fit", *kept, f"--init_from={file}", "--debug"]) == 0
    first = metrics(tmp_path / "logs/default/again")[0]["train/loss"]
    assert first == pytest.approx(result["validation_loss"], abs=0.3)  # untrained it is 5.5


def test_an_import_has_the_form_of_a_run_s_checkpoint(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.ckpt"
    import_checkpoint(folder, file)
    own = torch.load(sorted((run / "checkpoints").iterdir())[-1], weights_only=True)
    made = torch.load(file, weights_only=True)
    assert made["hyper_parameters"].keys() == {"network", "position"}
    assert made["hyper_parameters"].items() <= own["hyper_parameters"].items()
    assert made["state_dict"].keys() == own["state_dict"].keys()
    for name, tensor in own["state_dict"].items():
        assert torch.equal(made["state_dict"][name], tensor)
    assert describe(file)["step"] == 0
    LanguageModel.load_from_checkpoint(file, weights_only=True)
    with pytest.raises(InputError, match="exists"):
        import_model.main([str(folder), str(file)])
    with pytest.raises(InputError, match="exists"):
        export_model.main([str(run), str(folder)])


def test_text_of_another_tokenizer_than_the_weights_is_refused(
    run: Path, folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corpus that was prepared again under its name, with as many ids in another order."""
    other = json.loads((folder / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough, ee aa. " * 40)
    again = run_prepare(text, tmp_path / "again", str(tmp_path / "tokenizer.json"))
    moved = tmp_path / "logs" / "moved"
    shutil.copytree(run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(corpus), str(again)))
    exported = shutil.copytree(folder, tmp_path / "exported")
    (exported / "tokenizer.json").write_text(json.dumps(other))
    (exported / "checksums.json").unlink()
    checkpoint = tmp_path / "imported.ckpt"
    import_model.main([str(folder), str(checkpoint)])
    reads = ["--suite", "perplexity", "--lengths", "16", "--text"]
    for model in (moved, exported):
        for command in (
            ["generate", "--ckpt", str(model), "--prompt", "a"],
            ["evaluate", str(model), *reads, str(text), "--out", str(tmp_path / "e")],
            ["export", str(model), str(tmp_path / "out")],
            ["analyze", "attention", str(model), "--out", str(tmp_path / "a")],
        ):
            if (command[0], model) != ("analyze", exported):
                assert main(command) == 2, command
                assert "was trained with tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    for begun in (run / "checkpoints" / "step-0000005.ckpt", folder, checkpoint):
        changes = {"init_from": begun, "trainer__max_steps": 1}
        assert main(arguments(again, tmp_path, "new", **changes)) == 2, begun
        assert "trained with tokenizer" in capsys.readouterr().err
    # A tokenizer that is given is the user's word: it is used, with a warning.
    given = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    with pytest.warns(UserWarning, match="was trained with tokenizer"):
        assert main(["generate", "--ckpt", str(run), "--prompt", "a", *given]) == 0
    assert main(["generate", "--ckpt", str(folder), "--prompt", "a"]) == 0


@pytest.mark.parametrize("out", ["file/x", "/proc/x", "x" * 300])
def test_outputs_that_cannot_be_written_are_refused_before_work(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("ropepp.interop.saved.open_model", None)
    monkeypatch.setattr("ropepp.interop.saved.import_checkpoint", None)
    for command in (["export", "model", out], ["import", "model", out]):
        assert main(command) == 2
        assert f"error: {out} cannot be written: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_model_is_made_for_travels(folder: Path, tmp_path: Path) -> None:
    """Context length and ids of the text: by import, convert and export again."""
    position = tmp_path / "ec.yaml"
    position.write_text("class_path: RoPEppEC\n")
    settings = json.loads((folder / "config.json").read_text())
    for made in ("import", "convert"):
        given = [] if made == "import" else ["--position", str(position)]
        assert main([made, str(folder), str(tmp_path / f"{made}.ckpt"), *given]) == 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["export", str(tmp_path / f"{made}.ckpt"), str(tmp_path / "out")]) == 0
        again = json.loads((tmp_path / "out" / "config.json").read_text())
        for key in ("max_position_embeddings", "bos_token_id", "eos_token_id"):
            assert again[key] == settings[key]
        assert (tmp_path / "out" / "generation_config.json").is_file()


def test_checkpoints_of_a_run_are_never_replaced(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    position = tmp_path / "ec.yaml"
    position.write_text("class_path: RoPEppEC\n")
    for file in (run / "checkpoints").iterdir():
        before = file.read_bytes()
        for args in (["import"], ["convert", "--position", str(position)]):
            assert main([args[0], str(folder), str(file), *args[1:]]) == 2
            assert "exists; choose another name" in capsys.readouterr().err
        assert file.read_bytes() == before


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:x"])
def test_devices_that_are_none(
    folder: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--ckpt", str(folder), "--prompt", "a", "--device", device]) == 2
    assert f"--device is '{device}'" in capsys.readouterr().err


def test_what_a_run_knows_outlives_a_conversion(run: Path, tmp_path: Path) -> None:
    """Also beside a configuration of somebody else's."""
    (tmp_path / "config.yaml").write_text("data: {init_args: [1]}\n")
    import_model.main([str(run), str(tmp_path / "m.ckpt")])
    export_model.main([str(tmp_path / "m.ckpt"), str(tmp_path / "out"), "--tokenizer", "bytes"])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 32
    assert open_model(tmp_path / "m.ckpt").run is None
    plain = tmp_path / "plain"
    export(open_model(tmp_path / "m.ckpt"), plain, "hf")
    known = open_model(run).tokenizers
    assert open_model(plain).tokenizers == known != ()
