"""Models by their names on the hub, from a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import evaluated
from helpers.dry_cli import DryCLI
from helpers.fit_runs import arguments
from helpers.golden_data import REPOSITORY
from helpers.hub_server import digest, hub
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop.saved import open_model
from ropepp.model.folders.hub import local_path
from ropepp.model.folders.published import load_pretrained

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "SII-xrliu/RoPEPP_EC-DCLM-376M-4k"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer, root = evaluated.make_tokenizer(), tmp_path_factory.mktemp("models")
    made = {
        revision: evaluated.write_folder(root / revision, tokenizer, seed)
        for seed, revision in enumerate(("main", "old"))
    }
    (made["main"] / "pytorch_model.bin").write_bytes(b"a pickle")
    return made


@pytest.fixture
def asked(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """The requests to a hub with a model of two revisions and one that is gated."""
    with hub({NAME: folders, "meta/gated": {}}) as (endpoint, requests):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        yield requests


def test_a_model_is_fetched_once_without_its_pickles(
    asked: list[str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = open_model(f"hub:{NAME}")
    assert saved.name == "RoPEPP_EC-DCLM-376M-4k"
    assert saved.tokenizer().fingerprint == evaluated.make_tokenizer().fingerprint
    for a, b in zip(
        saved.model.parameters(), load_pretrained(folders["main"]).parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert not any("pytorch_model" in request and "GET" in request for request in asked)
    weights = [
        request for request in asked if request.startswith("GET") and "safetensors" in request
    ]
    assert len(weights) == 1
    open_model(f"hub:{NAME}")
    assert len([r for r in asked if r.startswith("GET") and "safetensors" in r]) == 1
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no network: the cache does
    assert local_path(f"hub:{NAME}") == saved.path


def test_a_revision_is_a_branch_or_a_hash(asked: list[str], folders: dict[str, Path]) -> None:
    old = load_pretrained(folders["old"]).embed_tokens.weight
    for revision in ("old", digest(str(folders["old"]).encode())):
        found = open_model(f"hub:{NAME}@{revision}").model.embed_tokens.weight
        assert torch.equal(found, old)
    with pytest.raises(InputError, match=rf"hub:{NAME}@none: the model has no revision 'none'"):
        local_path(f"hub:{NAME}@none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:nobody/nothing", "hub:nobody/nothing: the hub has no such model, or shows it"),
        ("hub:meta/gated", "hub:meta/gated: the hub has no such model, or shows it"),
        ("hub:a/b/c", "model is 'hub:a/b/c', no name of the hub"),
        ("hub:", "model is 'hub:'; allowed is hub:NAME or hub:NAME@REVISION"),
        (f"hub:{NAME}@", "allowed is hub:NAME or hub:NAME@REVISION"),
    ],
)
def test_what_is_not_there_is_named_in_a_line(asked: list[str], name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        local_path(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError) as error:
        local_path(f"hub:{NAME}")
    assert f"hub:{NAME}: the hub cannot be reached" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'ropepp\[hub\]'"):
        local_path(f"hub:{NAME}")
    assert local_path("some/folder") == Path("some/folder")


def test_every_command_takes_such_a_name(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = f"hub:{NAME}", tmp_path / "out"
    assert main(["generate", "--ckpt", name, "--prompt", "en to", "--max_new_tokens", "2"]) == 0
    (tmp_path / "a.txt").write_text("en to tre " * 20)
    text = ["--text", str(tmp_path / "a.txt")]
    options = ["--suite", "perplexity", "--lengths", "16", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", name, *text, *options]) == 0
    assert list(json.loads((out / "evaluation.json").read_text())["models"]) == [
        "RoPEPP_EC-DCLM-376M-4k"
    ]
    ckpt = tmp_path / "model.ckpt"
    assert main(["import", name, str(ckpt)]) == 0
    assert open_model(ckpt).step == 0
    assert main(["export", name, str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main(["generate", "--ckpt", "hub:no/one", "--prompt", "en"]) == 2
    assert "hub:no/one: the hub has no such model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_endpoint_is_that_of_the_environment(folders: dict[str, Path], tmp_path: Path) -> None:
    with hub({NAME: folders}) as (endpoint, asked):
        command = [sys.executable, "-m", "ropepp.cli", "generate", "--ckpt", f"hub:{NAME}@old"]
        done = subprocess.run(
            [*command, "--prompt", "en to", "--max_new_tokens", "3"],
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path),
                "PYTHONPATH": str(REPOSITORY / "src"),
            },
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("en to")
        assert any("safetensors" in request for request in asked)


def test_a_run_begins_from_such_a_model(asked: list[str], tmp_path: Path) -> None:
    flags = arguments(tmp_path / "corpus", tmp_path, "r", init_from=f"hub:{NAME}@old")
    cli = DryCLI(flags)
    assert cli.options.init_from == f"hub:{NAME}@old"  # what its config.yaml keeps
    assert cli.model.init_from == str(local_path(f"hub:{NAME}@old"))
