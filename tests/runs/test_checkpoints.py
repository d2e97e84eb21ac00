"""Checkpoints on disk: torn ones are seen and left out, weights come from every form."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.fit_runs import arguments, curve, fit
from helpers.golden_data import root
from helpers.processes import spawn
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop import load_pretrained
from ropepp.interop.saved import write_checkpoint
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import num_parameters
from ropepp.model.positions import FoPE, Position, RoPE, RoPEppEC
from ropepp.runs.checkpoints import describe, newest_complete, torn
from ropepp.train.optim import AdamW, Muon
from ropepp.train.weights import load_optimizer_from, load_weights

CONFIG = ModelConfig(257, 32, 2, 4, 2, 48)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "first", checkpoint__keep=0)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that may be damaged; unfinished."""
    shutil.copytree(run, tmp_path / "default" / "first")
    (tmp_path / "default" / "first" / "result.json").unlink()
    return tmp_path / "default" / "first"


def write_shards(folder: Path) -> None:
    """What each of two processes has of a model, as `fit` writes it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh

    from ropepp.train.strategy import shard

    with torch.device("meta"):
        model = Transformer(CONFIG, RoPEppEC())
    shard(model, init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    model.initialize(5)
    state = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save({"state_dict": state}, checkpoint_id=folder)
    if torch.distributed.get_rank() == 0:
        torch.save({"global_step": 7, "hyper_parameters": {}}, folder / "meta.pt")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "step-0000007.ckpt"
    spawn(2, write_shards, folder)
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.slow
def test_torn_shards(shards: Path, tmp_path: Path) -> None:
    assert torn(shards) is None
    for name, damage, reason in (
        (".metadata", Path.unlink, ".metadata is missing"),
        (".metadata", cut, ".metadata is incomplete"),
        ("meta.pt", Path.unlink, "meta.pt is missing"),
        ("meta.pt", cut, "torn: it is no complete archive"),
        ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
        ("__0_0.distcp", cut, "__0_0.distcp is .* bytes long instead of"),
    ):
        damaged = tmp_path / name.strip(".") / damage.__name__ / shards.name
        shutil.copytree(shards, damaged)
        damage(damaged / name)
        with pytest.raises(InputError, match=reason):
            load_weights(Transformer(CONFIG, RoPEppEC()), damaged)
    with pytest.raises(InputError, match="does not exist"):
        torn(tmp_path / "nothing")


@pytest.mark.slow
def test_shards_into_a_whole_model(shards: Path) -> None:
    model, expected = (Transformer(CONFIG, RoPEppEC(), seed=seed) for seed in (0, 5))
    load_weights(model, shards)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"'layers.0.self_attn.o_proj.weight' is \(32, 64\)"):
        load_weights(Transformer(CONFIG, RoPE()), shards)
    assert describe(shards)["parameters"] == sum(p.numel() for p in model.parameters())


def test_resume_leaves_torn_ones_out(copy: Path, corpus: Path, run: Path) -> None:
    newest = copy / "checkpoints" / "step-0000020.ckpt"
    cut(newest)
    (copy / "checkpoints" / "step-0000021.tmp").mkdir()
    with pytest.warns(UserWarning, match=r"step-0000020.ckpt is torn and left out: .* archive"):
        found = newest_complete(copy / "checkpoints")
    assert found == copy / "checkpoints" / "step-0000015.ckpt"
    with pytest.warns(UserWarning, match="left out"):
        fit(corpus, copy.parent.parent, "first", resume="auto")
    assert curve(copy) == curve(run)
    assert torn(newest) is None  # written anew


def test_auto_begins_where_there_is_nothing(
    copy: Path, corpus: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy)
    fit(corpus, copy.parent.parent, "first", resume="auto")
    assert curve(copy) == curve(run)
    with pytest.raises(SystemExit) as left:
        main(arguments(corpus, copy.parent.parent, "first", resume="auto"))
    assert left.value.code == 0
    assert "is finished" in capsys.readouterr().out
    fit(corpus, copy.parent.parent, "first", resume="auto", trainer__max_steps=22)  # longer
    assert curve(copy)[-1]["step"] == 22


def test_a_torn_checkpoint_is_refused_by_name(
    copy: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "checkpoints" / "step-0000010.ckpt"
    cut(path)
    assert main(arguments(corpus, copy.parent.parent, "other", ckpt_path=path)) == 2
    err = capsys.readouterr().err
    assert f"ckpt_path is {path}, which is torn" in err
    assert err.count("\n") == 1


def test_inspect(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(copy / "checkpoints" / "step-0000010.ckpt")
    assert main(["checkpoint", "inspect", str(copy)]) == 0
    out = capsys.readouterr().out
    assert out.count(": complete, single file") == 3
    assert out.count("TORN") == 1
    assert "step 20, 5,120 tokens, RoPEppEC, 34,016 parameters" in out
    path = copy / "checkpoints" / "step-0000020.ckpt"
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 20
    assert found["settings"]["position"]["init_args"]["theta"] == 10000.0
    assert main(["checkpoint", "inspect", str(copy / "nothing")]) == 2


def test_a_stage_begins_with_the_weights_alone(run: Path, corpus: Path, tmp_path: Path) -> None:
    """Not the optimizer, the schedule or the data: those begin anew."""
    last = run / "checkpoints" / "step-0000020.ckpt"
    still = {"model__optimizer.lr": 0, "trainer__max_steps": 1}
    stage = fit(corpus, tmp_path, "stage", init_from=last, **still)
    assert curve(stage)[0]["train/tokens"] == 8 * 32
    model = Transformer(CONFIG, RoPEppEC())
    load_weights(model, stage / "checkpoints" / "step-0000001.ckpt")
    expected = torch.load(last, weights_only=True)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"network.{name}"])
    theta = fit(corpus, tmp_path, "ntk", init_from=last, **still, model__position__theta=5e5)
    assert curve(theta)[0]["train/loss"] != curve(stage)[0]["train/loss"]


def test_weights_from_a_published_folder() -> None:
    folder = root() / "gqa-eh"
    published = load_pretrained(folder)
    model = Transformer(published.config, published.position, seed=1)
    load_weights(model, folder)
    for a, b in zip(model.parameters(), published.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"num_layers": 3}, r"tensor 'layers.2.* is missing"),
        ({"num_layers": 1}, r"unexpected tensor 'layers.1"),
        ({"ffn_size": 64}, r"mlp.gate_proj.weight' is \(48, 32\); expected \(64, 32\)"),
    ],
)
def test_weights_that_do_not_fit(run: Path, network: dict[str, int], message: str) -> None:
    sizes = {**vars(CONFIG), **network}
    model = Transformer(ModelConfig(**sizes), RoPEppEC())
    with pytest.raises(InputError, match=message):
        load_weights(model, run / "checkpoints" / "step-0000020.ckpt")


def test_a_stage_may_keep_the_moments(run: Path, corpus: Path, tmp_path: Path) -> None:
    """The first step then is not AdamW's first, which moves every weight by the whole rate."""
    last = run / "checkpoints" / "step-0000020.ckpt"
    stage = {"init_from": last, "trainer__max_steps": 1, "model__optimizer.lr": 0.002}
    kept = fit(corpus, tmp_path, "kept", init_optimizer=True, **stage)
    saved = torch.load(kept / "checkpoints" / "step-0000001.ckpt", weights_only=True)
    before = torch.load(last, weights_only=True)
    steps = [one["optimizer_states"][0]["state"][0]["step"].item() for one in (before, saved)]
    assert steps == [20, 21]
    assert curve(kept)[0]["train/learning_rate"] == 0.002
    fresh = fit(corpus, tmp_path, "fresh", **stage)
    assert curve(fresh)[0]["train/grad_norm"] == curve(kept)[0]["train/grad_norm"]
    anew = torch.load(fresh / "checkpoints" / "step-0000001.ckpt", weights_only=True)
    assert anew["optimizer_states"][0]["state"][0]["step"].item() == 1


def test_a_stage_may_go_on_with_a_fresh_optimizer(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step, data and weights are those of a plain resume, AdamW's first step is a first one; where
    the stage itself goes on, its own moments do."""
    last = run / "checkpoints" / "step-0000020.ckpt"
    whole = {"ckpt_path": last, "trainer__max_steps": 24, "checkpoint__every_n_steps": 2}
    kept = fit(corpus, tmp_path, "kept", **whole)
    fresh = fit(corpus, tmp_path, "fresh", fresh_optimizer=True, **whole)
    first = [
        {key: line[key] for key in ("step", "train/tokens", "train/loss", "train/learning_rate")}
        for line in (curve(kept)[0], curve(fresh)[0])
    ]
    assert first[0] == first[1]
    assert curve(kept)[1]["train/loss"] != curve(fresh)[1]["train/loss"]
    steps = [
        torch.load(path / "checkpoints" / f"step-{step:07}.ckpt", weights_only=True)[
            "optimizer_states"
        ][0]["state"][0]["step"].item()
        for path, step in ((kept, 22), (fresh, 22), (fresh, 24))
    ]
    assert steps == [22, 2, 4]
    half = {**whole, "trainer__max_steps": 22}
    fit(corpus, tmp_path, "killed", fresh_optimizer=True, **half)
    killed = fit(corpus, tmp_path, "killed", fresh_optimizer=True, resume="auto", **whole)
    assert curve(killed)[-1]["train/loss"] == curve(fresh)[-1]["train/loss"]
    assert main(arguments(corpus, tmp_path, "bad", fresh_optimizer=True)) == 2
    assert "there is no ckpt_path" in capsys.readouterr().err


def test_moments_need_a_checkpoint(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(corpus, tmp_path, "bad", init_optimizer=True)) == 2
    assert "there is no init_from" in capsys.readouterr().err


def moments_from_shards(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    from ropepp.train.optim import AdamW
    from ropepp.train.strategy import shard

    model = Transformer(CONFIG, RoPEppEC())
    shard(model, init_device_mesh("cpu", (2,)))
    optimizer = AdamW().build(model)
    model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[
        0
    ].backward()
    optimizer.step()
    optimizer.zero_grad()
    dcp.save({"optimizer_0": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    if torch.distributed.get_rank() == 0:
        torch.save({}, folder / "meta.pt")
    torch.distributed.barrier()
    again = AdamW(lr=0.5).build(model)
    load_optimizer_from(model, again, folder)
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            other = again.state[parameter][key]
            assert torch.equal(
                getattr(value, "_local_tensor", value), getattr(other, "_local_tensor", other)
            )


@pytest.mark.slow
def test_moments_from_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    spawn(2, moments_from_shards, folder)
    model = Transformer(CONFIG, RoPEppEC())
    optimizer = AdamW().build(model)
    load_optimizer_from(model, optimizer, folder)  # one process, no process group
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    with pytest.raises(InputError, match="does not fit"):
        load_optimizer_from(model, Muon().build(model), folder)


@pytest.mark.parametrize("spec", [RoPE(), FoPE()], ids=["tied", "FoPE"])
def test_what_is_there_twice_or_constant_is_no_parameter(spec: Position, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(50, 32, 2, 4, 2, 48, tied_embeddings=True), spec)
    write_checkpoint(tmp_path / "m.ckpt", model, (), {})
    assert describe(tmp_path / "m.ckpt")["parameters"] == num_parameters(model)
