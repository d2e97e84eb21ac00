"""Every shipped configuration is parsed and instantiated."""

from pathlib import Path

import pytest
import torch
import yaml

from helpers.dry_cli import DryCLI
from helpers.golden_data import REPOSITORY
from ropepp.model import ModelConfig, Transformer
from ropepp.model import positions as variants
from ropepp.model.flops import num_parameters

CONFIGS = REPOSITORY / "configs"
TINY = {"vocab_size": 50, "hidden_size": 64, "num_layers": 1, "ffn_size": 32}


def shipped(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def instantiate(tmp_path: Path, *args: str) -> DryCLI:
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    return DryCLI(["fit", *args, *cpu, f"--logs={tmp_path}", "--run=dry"])


@pytest.mark.parametrize("name", shipped("experiment"))
def test_experiments(name: str, tmp_path: Path) -> None:
    cli = instantiate(tmp_path, f"--config={CONFIGS}/experiment/{name}.yaml")
    assert cli.model.network.embed_tokens.weight.is_meta
    assert cli.trainer.max_steps > 0


@pytest.mark.parametrize("name", shipped("model"))
def test_models(name: str) -> None:
    sizes = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    with torch.device("meta"):
        Transformer(ModelConfig(**sizes), variants.RoPEppEC())


@pytest.mark.parametrize("name", shipped("position"))
def test_positions(name: str, tmp_path: Path) -> None:
    experiment = f"--config={CONFIGS}/experiment/quickstart.yaml"
    flag = f"--model.position={CONFIGS}/position/{name}.yaml"
    position = instantiate(tmp_path, experiment, flag).model.network.position
    given = yaml.safe_load((CONFIGS / "position" / f"{name}.yaml").read_text())
    assert type(position).__name__ == given["class_path"]
    for heads, kv_heads in ((8, 4), (12, 6), (16, 4)):
        config = ModelConfig(num_heads=heads, num_kv_heads=kv_heads, head_size=32, **TINY)
        Transformer(config, position)(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("folder", ["data", "trainer"])
def test_parts(folder: str, tmp_path: Path) -> None:
    for name in shipped(folder):
        experiment = f"--config={CONFIGS}/experiment/quickstart.yaml"
        cli = instantiate(tmp_path, experiment, f"--{folder}={CONFIGS}/{folder}/{name}.yaml")
        given = yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text())
        if folder == "data":
            for key, value in given["init_args"].items():
                found = getattr(cli.datamodule, key)
                if key == "packing":  # a spec, given by its name or with arguments
                    spec = value if isinstance(value, dict) else {"class_path": value}
                    assert type(found).__name__ == spec["class_path"]
                    for argument, given_value in spec.get("init_args", {}).items():
                        assert getattr(found, argument) == given_value
                else:
                    assert found == value
        else:
            assert cli.trainer.gradient_clip_val == 1.0  # the experiment's
            assert "gradient_clip_val" not in given


def test_every_variant_has_a_configuration() -> None:
    paths = [yaml.safe_load(p.read_text())["class_path"] for p in (CONFIGS / "position").iterdir()]
    names = {
        name
        for name, kind in vars(variants).items()
        if isinstance(kind, type) and issubclass(kind, variants.Position) and name != "Position"
    }
    assert names == set(paths)


PUBLISHED = {
    "376m": {"rope": 375_931_904, "eh": 367_543_296, "ec": 384_320_512},
    "776m": {"rope": 776_246_784, "eh": 747_935_232, "ec": 804_558_336},
    "1.5b": {"rope": 1_397_819_392, "eh": 1_347_487_744, "ec": 1_464_928_256},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_models_through_the_recipe(size: str, tmp_path: Path) -> None:
    """Built on the meta device from the shipped files, with the published numbers of parameters."""
    for name, parameters in PUBLISHED[size].items():
        cli = instantiate(
            tmp_path,
            f"--config={CONFIGS}/experiment/pretrain_376m.yaml",
            f"--model.network={CONFIGS}/model/{size}.yaml",
            f"--model.position={CONFIGS}/position/{name}.yaml",
        )
        assert num_parameters(cli.model.network) == parameters
        assert all(parameter.is_meta for parameter in cli.model.network.parameters())
        tokens = cli.datamodule.sequence_length * cli.datamodule.global_batch_size
        assert (tokens, cli.trainer.max_steps) == (4096 * 128, 90_000)
