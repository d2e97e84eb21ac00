"""A sweep's YAML: what is refused and why, the rows that follow from it, and growing it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.golden_data import REPOSITORY
from helpers.sweep_runs import Sweeps
from ropepp.commands.sweep import main
from ropepp.errors import InputError
from ropepp.runs.records import RunSpec, read_plan, read_runs
from ropepp.sweep.config import load
from ropepp.sweep.study import open_sweep

SHIPPED = sorted((REPOSITORY / "configs" / "sweep").glob("*.yaml"))
RANGE = {"model.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}}
IGNORED = {"ropepp", "_yaml", "cython_runtime", "_cython_3_1_4"}
DRAWN = {"sampler": "tpe", "trials": 2, "search": RANGE}
RATES = [{"class_path": "AdamW", "init_args": {"lr": rate}} for rate in (0.001, 0.002)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"varients": {}}, "unknown key varients; allowed: name, base, variants"),
        ({"name": ...}, "name is missing or empty"),
        ({"name": "a/b"}, "name is 'a/b'; allowed: letters"),
        ({"name": 3}, "name is 3; allowed: text"),
        ({"base": []}, "base is missing or empty"),
        ({"base": ["no.yaml"]}, "base is 'no.yaml', which is no file beside"),
        ({"variants": {}}, "variants is missing or empty"),
        ({"variants": ["rope"]}, "variants is ['rope']; allowed: names and their keys of fit"),
        ({"variants": {"a b": {}}}, "a name in variants is 'a b'"),
        ({"variants": {"a": 3}}, "variants.a is 3; allowed: keys of fit"),
        ({"variants": {"a": {"model.position": "no.yaml"}}},
         "variants.a.model.position is 'no.yaml', which is no file beside"),
        ({"variants": {"a": {"run": "b"}}}, "variants.a.run: config, experiment, run"),
        ({"variants": {"a": {"display": 3}}}, "variants.a.display is 3; allowed: text"),
        ({"set": {"seed_everything": 3}}, "set.seed_everything: config, experiment"),
        ({"set": {"model optimizer": 3}}, "set: 'model optimizer' is no key of fit"),
        ({"axes": {"model.z_loss": []}}, "axes.model.z_loss is []; allowed: a list of at least"),
        ({"axes": {"model.z_loss": [1, 1]}}, "two rows would have the name 'rope-z_loss=1'"),
        ({"axes": {"model.position": ["x"]}},
         "axes.model.position and variants.rope.model.position both set model.position: leave one"),
        ({"axes": {"model.position.theta": [1]},
          "variants": {"a": {"model.position.init_args.theta": 2}}},
         "axes.model.position.theta and variants.a.model.position.init_args.theta both set"),
        ({"axes": {"model.position.theta": [1]}, "variants": {"a": {"model.position": {
            "class_path": "RoPE", "init_args": {"theta": 2}}}}},
         "axes.model.position.theta and variants.a.model.position both set model.position.theta"),
        ({"axes": {"model.optimizer": RATES}, "variants": {"a": {"model.optimizer.lr": 0.5}}},
         "axes.model.optimizer and variants.a.model.optimizer.lr both set model.optimizer.lr"),
        ({"axes": {"model.optimizer": RATES}, "set": {"model.optimizer.lr": 0.5}},
         "axes.model.optimizer and set.model.optimizer.lr both set model.optimizer.lr"),
        ({"axes": {"model.optimizer": RATES, "model.optimizer.lr": [0.5]}},
         "axes.model.optimizer and axes.model.optimizer.lr both set model.optimizer.lr"),
        ({"axes": {"model.optimizer.lr": [1], "model.optimizer.init_args.lr": [2]}},
         "axes.model.optimizer.lr and axes.model.optimizer.init_args.lr both set"),
        ({**DRAWN, "axes": {"model.optimizer.init_args.lr": [1]}},
         "axes.model.optimizer.init_args.lr and search.model.optimizer.lr both set"),
        ({**DRAWN, "variants": {"a": {"model.optimizer.init_args.lr": 1}}},
         "search.model.optimizer.lr and variants.a.model.optimizer.init_args.lr both set"),
        ({"axes": {"model.optimizer.lr": [None]}}, "lr of AdamW is null; it needs a value"),
        ({"seeds": []}, "seeds is []; allowed: a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]"),
        ({"seeds": 3}, "seeds is 3"),
        ({"controls": ["eh"]}, "controls has 'eh'; allowed: rope, ec"),
        ({"controls": {}}, "controls is {}; allowed: a list of variants"),
        ({"baseline": "eh"}, "baseline is 'eh'; allowed: rope, ec"),
        ({"metric": "seconds"}, "metric is 'seconds'; allowed: validation_loss, "),
        ({"sampler": "bayes"}, "sampler is 'bayes'; allowed: grid, random, tpe"),
        ({"trials": 3}, "search, trials and pruner need sampler: random or tpe"),
        ({"sampler": "tpe"}, "sampler tpe needs search, and trials of at least 1"),
        ({**DRAWN, "search": {"model.z_loss": {"low": 0, "high": 1, "log": True}}},
         "search.model.z_loss is {'low': 0, 'high': 1, 'log': True}; allowed: low and high"),
        ({**DRAWN, "search": {"model.z_loss": {"low": 2, "high": 1}}}, "search.model.z_loss"),
        ({**DRAWN, "search": {"model.z_loss": 3}}, "search.model.z_loss is 3"),
        ({**DRAWN, "pruner": "greedy"}, "pruner is 'greedy'; allowed: none, median, hyperband"),
        ({**DRAWN, "pruner": {"name": "median", "patience": 3}}, "pruner: MedianPruner"),
        ({"launcher": "srun ropepp fit"}, "launcher is 'srun ropepp fit'; it needs {args} as one"),
        ({"launcher": "srun {args} {nodes}"}, "known: {python}, {args}, {gpus}"),
        ({"set": {"model.optimizer.lr": "much"}}, "set.model.optimizer.lr (in rope): "),
        ({"set": {"model.nonsense": 3}}, "set.model.nonsense (in rope): unrecognized"),
        ({"set": {"trainer.max_steps": 0}}, "max_steps is 0"),
        ({"set": {"model.network.vocab_size": 100}}, "vocab_size is 100, but the data has"),
        ({"variants": {"a": {"model.position": {"class_path": "RoPE3"}}}},
         "variants.a.model.position: model.position is 'RoPE3'; allowed: ALiBi"),
        ({"variants": {"a": {"data": {"class_path": "RecallDataModule", "init_args": {}}}}},
         "data: RecallDataModule needs sequence_length"),
        ({"variants": {"a": {"model.position": {
            "class_path": "PartialDoubling", "init_args": {"doubled_share": 0.25}}}}},
         "variants.a: doubled_share 0.25 doubles 1 of 4 heads"),
    ],
)  # fmt: skip
def test_bad_input_starts_nothing(changes: dict[str, Any], words: str, sweeps: Sweeps) -> None:
    file = sweeps.write(**changes)
    with pytest.raises(InputError) as error:
        main(["init", str(file)])
    message = str(error.value)
    assert words in message
    assert str(file) in message
    assert "\n" not in message
    assert not list(sweeps.logs.rglob("trial.json"))
    assert not list(sweeps.logs.rglob("fit.log"))


def test_bad_yaml(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    with pytest.raises(InputError, match=r"sweep.yaml is neither a sweep's YAML nor"):
        load(file)
    for text, words in (
        ("a: [", "sweep.yaml"),
        ("a: 1\na: 2", "duplicate key a"),
        ("3", "int"),
        ("- 3", "allowed: keys name"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            load(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of every sweep in configs/ is accepted by fit, without the data."""
    monkeypatch.chdir(tmp_path)
    main(["init", str(file)])
    plan = read_plan(tmp_path / "logs" / file.stem)
    config = load(file)
    assert plan.name == config.name == file.stem
    assert plan.question == config.question != ""
    assert plan.baseline in plan.variants
    assert len(read_runs(config.folder)) == len(plan.variants) * len(config.seeds)
    assert not list(tmp_path.rglob("fit.log"))


def test_sizes_in_projections() -> None:
    """The table in its comment."""
    import torch

    from ropepp.model import ModelConfig, Transformer
    from ropepp.model import positions as variants
    from ropepp.model.flops import num_parameters

    file = REPOSITORY / "configs/sweep/projections.yaml"
    config = load(file)
    lines = [line.strip("# ").split() for line in file.read_text().splitlines()]
    for row in config.rows:
        flat = config.flat(row)
        named = {k.removeprefix("model.network."): v for k, v in flat.items()}
        sizes = {k: v for k, v in named.items() if "." not in k and f"model.network.{k}" in flat}
        kind = getattr(variants, flat["model.position"])
        with torch.device("meta"):
            model = Transformer(ModelConfig(**sizes), kind())
        (line,) = [line for line in lines if line[:1] == [row.name] and len(line) > 5]
        layout = model.layout
        found = [layout.num_projections, layout.num_heads, layout.num_kv_heads, sizes["ffn_size"]]
        assert [int(cell) for cell in line[1:5]] == found
        assert line[5] == f"{num_parameters(model):,}"


def test_rows_of_axes(sweeps: Sweeps) -> None:
    (sweeps.folder / "yarn.yaml").write_text("class_path: YaRN\ninit_args: {factor: 2.0}\n")
    rate, scaling = "model.optimizer.lr", "model.position.scaling"
    file = sweeps.write(
        axes={rate: [1e-3, 0.02], scaling: [None, "yarn.yaml"]}, baseline="ec", controls=["rope"]
    )
    config = load(file)
    names = [row.name for row in config.rows]
    assert names[:4] == [
        "rope-lr=0.001-scaling=null", "rope-lr=0.001-scaling=yarn",
        "rope-lr=0.02-scaling=null", "rope-lr=0.02-scaling=yarn",
    ]  # fmt: skip
    assert len(names) == 8
    plan = config.plan()
    assert plan.baseline == "ec-lr=0.001-scaling=null"
    assert plan.controls == names[:4]  # each of the baseline at its own values
    # What differs from the baseline in the variant alone is compared with it; its own rows at other
    # values are compared with its first.
    assert [plan.baseline_of(name) for name in names] == [*names[4:], *[names[4]] * 4]
    fixed = replace(config, baseline=names[2]).plan()
    assert {fixed.baseline_of(name) for name in names} == {names[2]}
    assert fixed.controls == [names[2]]
    drawn = [row.with_values({"model.z_loss": 0.1}, {"model.z_loss": 0.1}) for row in config.rows]
    others = [config.plan(drawn).baseline_of(row.name) for row in drawn]
    assert others == [*names[4:], *names[4:]]  # as it stands, at the same values of the axes
    assert config.plan(drawn).controls == plan.controls
    assert plan.display["ec-lr=0.02-scaling=yarn"] == "ec, lr 0.02, scaling yarn"
    assert not plan.shared_learning_rate
    assert config.rows[1].asked[scaling] == {"class_path": "YaRN", "init_args": {"factor": 2.0}}
    assert config.settings(config.rows[1]) == {
        "position": "RoPE", "lr": 1e-3, "scaling": "YaRN", "factor": 2.0
    }  # fmt: skip
    main(["init", str(file)])
    run = next(run for run in read_runs(config.folder) if run.spec.variant == names[1])
    yarn = {"factor": 2.0, "original_length": 4096, "slow": 1.0, "fast": 32.0}
    assert run.spec.overrides[scaling] == {"class_path": "YaRN", "init_args": yarn}
    line = f"--{scaling}=" + json.dumps(run.spec.overrides[scaling])
    assert line in config.arguments(run.spec)


def test_a_class_does_not_undo_what_is_said_of_its_arguments(sweeps: Sweeps) -> None:
    theta = "model.position.theta"
    position = {"class_path": "RoPEppEC", "init_args": {"theta": 10000.0}}
    variants = {"a": {"model.position": position}, "b": {theta: 7.0, "model.position": position}}
    config = load(sweeps.write(variants=variants, set={theta: 500.0}, baseline="a", controls=[]))
    for row, wanted in zip(config.rows, (500.0, 7.0), strict=True):
        assert config.flat(row)[theta] == wanted
        flags = config.flags(config.fixed["set"] | row.asked)
        assert flags[-1] == f"--{theta}={wanted}"
        assert config.settings(row) == {"position": "RoPEppEC", "theta": wanted}


def test_axes_may_change_what_no_row_is_named_after(sweeps: Sweeps) -> None:
    """What is in a file, or set for all; and a rate may belong to the variant, not to the class."""
    (sweeps.folder / "rope.yaml").write_text("class_path: RoPE\ninit_args: {theta: 2.0}\n")
    variants = {"a": {"model.position": "rope.yaml", "model.optimizer.lr": 0.5}}
    theta, classes = "model.position.theta", [{"class_path": "AdamW"}, {"class_path": "Muon"}]
    axes = {"model.position.init_args.theta": [3.0], "model.optimizer": classes}
    config = load(sweeps.write(variants=variants, axes=axes, set={theta: 4.0}, controls=[]))
    for row, name in zip(config.rows, ("AdamW", "Muon"), strict=True):
        assert row.name == f"a-theta=3-optimizer={name}"
        known = {"position": "RoPE", "theta": 3.0, "optimizer": name, "lr": 0.5}
        assert config.settings(row) == known


def test_classes_are_complete(sweeps: Sweeps) -> None:
    """What a class leaves out is its default, not what the base configuration has there."""
    from ropepp.train.estimate import EstimateCLI

    base = sweeps.folder / "base.yaml"
    content = yaml.safe_load(base.read_text())
    scaling = {"class_path": "PI", "init_args": {"factor": 4.0}}
    arguments = {"theta": 5e5, "rotary_share": 0.5, "scaling": scaling}
    content["model"]["position"] = {"class_path": "RoPE", "init_args": arguments}
    base.write_text(yaml.safe_dump(content))
    file = sweeps.write(variants={"pythia": {"model.position": {"class_path": "Pythia"}}, "as": {}})
    sweep = open_sweep(load(file))
    positions = []
    for trial in sweep.trials()[:2]:
        cli = EstimateCLI(["fit", *sweep.config.arguments(trial.runs[0])])
        positions.append(cli.model.network.position)
    assert type(positions[0]).__name__ == "Pythia"
    assert (positions[0].theta, positions[0].rotary_share, positions[0].scaling) == (
        1e4,
        0.25,
        None,
    )
    assert (positions[1].theta, positions[1].rotary_share) == (5e5, 0.5)


def test_shared_learning_rate(sweeps: Sweeps) -> None:
    def shared(**changes: Any) -> bool:
        return load(sweeps.write(**changes)).plan().shared_learning_rate

    rate, optimizer = "model.optimizer.lr", "model.optimizer"
    muon = {"class_path": "Muon", "init_args": {"lr": 0.01}}
    assert shared()
    assert shared(variants={"a": {rate: 0.01}, "b": {}})
    assert shared(variants={"a": {"model.optimizer.init_args.lr": 0.01}, "b": {optimizer: muon}})
    assert not shared(variants={"a": {rate: 0.02}, "b": {}})
    assert not shared(variants={"a": {optimizer: muon, rate: 0.02}, "b": {optimizer: muon}})
    assert shared(variants={"a": {rate: 0.02}, "b": {rate: 0.02}})
    assert not shared(**DRAWN)


def test_init_again_and_growing(sweeps: Sweeps) -> None:
    """The same YAML changes nothing; more seeds and variants add; less leaves nothing behind."""

    def names() -> list[str]:
        return [t.name for t in open_sweep(load(sweeps.folder / "sweep.yaml")).trials()]

    main(["init", str(sweeps.write())])
    assert names() == ["rope/seed-0", "ec/seed-0", "rope/seed-1", "ec/seed-1"]
    grown = {
        "rope": {"model.position": {"class_path": "RoPE"}},
        "nope": {"model.position": {"class_path": "NoPE"}},
    }
    sweeps.write(variants=grown, seeds=[2, 1])
    assert names() == ["rope/seed-2", "nope/seed-2", "rope/seed-1", "nope/seed-1"]
    runs = [run.spec.run for run in read_runs(sweeps.logs / "try")]
    assert runs == ["rope/seed-1", "rope/seed-2", "nope/seed-1", "nope/seed-2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set": {"model.optimizer.lr": 0.5}}, "set.model.optimizer.lr was null and is 0.5"),
        ({"metric": "train_loss"}, 'metric was "validation_loss" and is "train_loss"'),
        ({"base": ["other.yaml"]}, "base.trainer.max_steps was 20 and is 30"),
    ],
)
def test_another_sweep_of_that_name(changes: dict[str, Any], words: str, sweeps: Sweeps) -> None:
    main(["init", str(sweeps.write())])
    content = yaml.safe_load((sweeps.folder / "base.yaml").read_text())
    content["trainer"]["max_steps"] = 30
    (sweeps.folder / "other.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="made from other settings") as error:
        main(["init", str(sweeps.write(**changes))])
    assert words in str(error.value)


def test_a_variant_that_was_trained_cannot_change(sweeps: Sweeps) -> None:
    variants = {"a": {"model.position": {"class_path": "RoPE", "init_args": {"theta": 1.0}}}}
    main(["init", str(sweeps.write(variants=variants))])
    variants["a"]["model.position"]["init_args"]["theta"] = 2.0
    main(["init", str(sweeps.write(variants=variants))])  # not yet
    assert read_runs(sweeps.logs / "try")[0].spec.settings["theta"] == 2.0
    (sweeps.directory("a/seed-0") / "result.json").write_text('{"validation_loss": 1.0}')
    variants["a"]["model.position"]["init_args"]["theta"] = 3.0
    words = r"model.position.init_args.theta was 2.0 and is 3.0.*choose another name"
    with pytest.raises(InputError, match=words):
        main(["init", str(sweeps.write(variants=variants))])


def test_command(sweeps: Sweeps) -> None:
    launcher = "torchrun --nproc-per-node=8 -m -- ropepp.cli fit {args}"
    config = load(sweeps.write(launcher=launcher))
    spec = RunSpec("ec", 3, {"model.compile": True, "model.optimizer.lr": 1e-5, "model.x": None})
    assert config.launch(config.arguments(spec), python="python", gpus="") == [
        *["torchrun", "--nproc-per-node=8", "-m", "--", "ropepp.cli", "fit"],
        f"--config={sweeps.folder}/base.yaml", "--experiment=try", "--run=ec/seed-3",
        f"--logs={sweeps.logs}", "--resume=auto", "--model.compile=true",
        "--model.x=null", "--model.optimizer.lr=1e-05", "--seed_everything=3",
    ]  # fmt: skip
    config = load(sweeps.write(launcher="env X={gpus} {python} {args}"))
    command = config.launch(config.arguments(spec), python="python", gpus="0,1")
    assert command[:3] == ["env", "X=0,1", "python"]


def modules(code: str) -> set[str]:
    """Top packages outside the standard library that a program has imported."""
    code += "; import sys; print(*{m.split('.')[0] for m in sys.modules}, sep=chr(10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()) - sys.stdlib_module_names


def test_status_is_light(sweeps: Sweeps) -> None:
    """No Lightning, torch or Optuna; for a folder nothing but the standard library."""
    file = sweeps.write()
    main(["init", str(file)])
    begin = "from ropepp.commands.sweep import main; main(['status', {!r}])"
    always = modules("import ropepp")
    of_folder = modules(begin.format(str(sweeps.logs / "try")))
    packages = {name for name in of_folder - always if name.isidentifier()}
    assert packages == set()
    assert "yaml" in modules(begin.format(str(file)))
    assert not {"torch", "lightning", "optuna"} & modules(begin.format(str(file)))
