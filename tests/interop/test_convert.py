"""More attention heads, the same function."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.small_models import exported, label
from ropepp.commands import convert as command
from ropepp.errors import InputError
from ropepp.interop.convert import convert
from ropepp.interop.saved import import_checkpoint, open_model
from ropepp.model import ModelConfig, Transformer
from ropepp.model.plain import to_plain
from ropepp.model.positions import (
    ALiBi,
    HeadSplit,
    PartialDoubling,
    Phases,
    Position,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    YaRN,
)
from ropepp.train.module import LanguageModel
from ropepp.train.optim import AdamW, Muon, OptimizerSpec
from ropepp.train.weights import load_optimizer_from, load_weights, places_of

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48, init_std=0.2)
SCALED = YaRN(4.0, 16)


def written(spec: Position, folder: Path, **left: bool) -> Path:
    """A position encoding's YAML, by its short name, without the arguments that are left out."""
    plain = to_plain(spec)
    plain["class_path"] = plain["class_path"].rpartition(".")[2]
    plain["init_args"] = {k: v for k, v in plain["init_args"].items() if left.get(k, True)}
    file = folder / "position.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def checkpoint(spec: Position, folder: Path, config: ModelConfig = CONFIG) -> Path:
    exported(Transformer(config, spec, seed=3).eval(), folder / "source", "ropepp")
    import_checkpoint(folder / "source", folder / "source.ckpt")
    return folder / "source.ckpt"


def ids(rows: int = 2, length: int = 30) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(0))


KEPT = [
    (RoPE(), RoPEppEC()),
    (RoPE(theta=5e5, scaling=SCALED), RoPEppEC(theta=5e5, scaling=SCALED)),
    (RoPE(rotary_share=0.5), RoPEppEC(rotary_share=0.5)),
    (RoPE(), PartialDoubling()),
    (PartialDoubling(), RoPEppEC()),
    (RoPE(), Phases(phases=(0.0, -45.0, 200.0))),
    (RoPE(), Phases(phases=(45.0, 360.0))),
    (RoPEppEC(), Phases(phases=(270.0, -45.0, 0.0))),
    (Phases(phases=(0.0, 0.0)), Phases(phases=(0.0, 30.0, 0.0))),
]
kept = pytest.mark.parametrize(("before", "after"), KEPT, ids=label)


@kept
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_function_stays(
    before: Position, after: Position, qk_norm: bool, tmp_path: Path
) -> None:
    config = ModelConfig(
        50, 32, 2, 4, 2, 48, qk_norm=qk_norm, tied_embeddings=qk_norm, init_std=0.2
    )
    source = checkpoint(before, tmp_path, config)
    convert(source, tmp_path / "new.ckpt", written(after, tmp_path))
    old, new = open_model(source).model, open_model(tmp_path / "new.ckpt").model
    assert new.position == after
    for double, bound in ((False, 1e-5), (True, 1e-12)):
        old, new = (x.double() if double else x for x in (old, new))
        want = old(ids())
        assert (new(ids()) - want).norm() / want.norm() < bound
    saved, found = old.state_dict(), new.state_dict()
    D = config.head_dim
    for name, tensor in saved.items():
        if not name.endswith("o_proj.weight"):
            assert torch.equal(found[name], tensor), name
    places = places_of(new.layout, old.layout)
    assert [new.layout.heads[p].projection for p in places] == [
        h.projection for h in old.layout.heads
    ]
    for a, b in zip(old.blocks(), new.blocks(), strict=True):
        columns = b.self_attn.o_proj.weight.unflatten(1, (-1, D))
        assert torch.equal(columns[:, places].flatten(1), a.self_attn.o_proj.weight)
        rest = sorted(set(range(new.layout.num_heads)) - set(places))
        assert not columns[:, rest].any()


@kept
def test_gradients_reach_the_new_heads_and_they_learn(
    before: Position, after: Position, tmp_path: Path
) -> None:
    source = checkpoint(before, tmp_path)
    convert(source, tmp_path / "new.ckpt", written(after, tmp_path))
    model = open_model(tmp_path / "new.ckpt").model.requires_grad_(True).train()
    optimizer = AdamW(lr=3e-3).build(model)
    losses = []
    for step in range(12):
        total, count = model.loss(ids()[:, :-1], ids()[:, 1:])
        (total / count).backward()
        losses.append((total / count).item())
        if step == 0:
            for block in model.blocks():
                gradient = block.self_attn.o_proj.weight.grad.unflatten(1, (-1, 8))
                assert (gradient.abs().amax((0, 2)) > 0).all()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert all(block.self_attn.o_proj.weight.all() for block in model.blocks())


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (RoPE(), RoPEppEH(), r"of 4 attention heads not all are among the new 4.*projection 2"),
        (RoPEppEC(), RoPE(), r"of 8 .* not all are among the new 4, .*lost.*phase -90 degrees"),
        (RoPE(), HeadSplit(), r"of 4 .*projection 2, phase 0 degrees"),
        (RoPE(), Phases(phases=(-45.0, -90.0)), "of 4 attention heads not all"),
        (RoPEppEH(), RoPEppEC(), "heads not all are among|projections .* are needed"),
        (RoPE(theta=5e5), RoPEppEC(), r"theta is 10000.0, .* it is 500000.0.*leave it out"),
        (RoPE(), RoPEppEC(scaling=SCALED), r"scaling is YaRN\(.*it is None"),
        (RoPE(), RoPEppEC(rotary_share=0.5), r"rotary_share is 0.5"),
        (RoPE(), ALiBi(), r"ALiBi\(\), the model of .* has RoPE"),
        (ALiBi(), RoPEppEC(), r"the model of .* has ALiBi\(\)"),
    ],
    ids=label,
)
def test_what_would_change_the_function_is_refused(
    before: Position, after: Position, words: str, tmp_path: Path
) -> None:
    source = checkpoint(before, tmp_path)
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "new.ckpt", written(after, tmp_path))
    assert not (tmp_path / "new.ckpt").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class_path: RoPEppEX", "RoPEppEX"),
        ("theta: 1.0", "is no position encoding: it needs class_path"),
        ("class_path: RoPEppEC\ninit_args: {base: 3}", "base"),
        ("class_path: RoPEppEC\ninit_args: {theta: none}", "theta|not supported"),
        ("class_path: os.system\ninit_args: {}", "os.system"),
        ("class_path: YaRN\ninit_args: {factor: 2.0}", "no position encoding"),
        ("[1]", "no position encoding"),
    ],
)
def test_files_that_are_no_position(text: str, words: str, tmp_path: Path) -> None:
    source = checkpoint(RoPE(), tmp_path)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "new.ckpt", tmp_path / "p.yaml")


def test_what_a_file_leaves_out_is_the_sources(tmp_path: Path) -> None:
    spec = RoPE(theta=5e5, scaling=SCALED)
    source = checkpoint(spec, tmp_path)
    file = written(RoPEppEC(), tmp_path, theta=False, scaling=False)
    _, model = convert(tmp_path / "source", tmp_path / "new.ckpt", file)  # a folder
    assert model.position == RoPEppEC(theta=5e5, scaling=SCALED)
    want = open_model(source).model(ids())
    torch.testing.assert_close(open_model(tmp_path / "new.ckpt").model(ids()), want)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spec", [AdamW(lr=1e-2), Muon(lr=1e-2)], ids=["AdamW", "Muon"])
def test_moments_of_what_stays_stay(spec: OptimizerSpec, scaled: bool, tmp_path: Path) -> None:
    """Also where the output projection, whose step depends on the heads, changes its group."""
    rule = {"step": {"heads": 1.0}} if scaled else {}
    config = ModelConfig(50, 32, 2, 4, 2, 48, init_std=0.2, o_proj=rule)  # type: ignore[arg-type]
    module = LanguageModel(config, RoPE(), optimizer=spec)
    module.configure_model()
    optimizer = spec.build(module.network)
    for _ in range(3):
        total, _ = module.network.loss(ids()[:, :-1], ids()[:, 1:])
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    content: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": dict(module.hparams),
        "global_step": 3,
    }
    torch.save(content, tmp_path / "source.ckpt")

    def state(net: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {name: optimizer.state.get(p, {}) for name, p in net.named_parameters()}

    want = state(module.network, optimizer)
    fresh = LanguageModel(config, RoPEppEC(), optimizer=spec)
    fresh.configure_model()
    load_weights(fresh.network, tmp_path / "source.ckpt")
    other = spec.build(fresh.network)
    load_optimizer_from(fresh, other, tmp_path / "source.ckpt")
    found = state(fresh.network, other)
    for name, values in want.items():
        if name.endswith("o_proj.weight"):
            assert not found[name]
        else:
            assert values
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(found[name][key]), torch.as_tensor(value))
    total, _ = fresh.network.loss(ids()[:, :-1], ids()[:, 1:])
    total.backward()
    other.step()
    again = state(fresh.network, other)
    if "step" in again["norm.weight"]:
        assert again["norm.weight"]["step"] == 4
    mixer = again["layers.0.self_attn.o_proj.weight"]
    assert mixer
    assert mixer.get("step", 1) == 1


@pytest.mark.parametrize("position", [RoPEppEC, RoPEppEH, PartialDoubling, Phases])
def test_models_that_begin_as_rope(position: type[Any]) -> None:
    """The real heads of the same seed, and nothing of the others; EH has half the projections."""
    model = Transformer(CONFIG, position(start_as_rope=True), seed=5).eval()
    sizes = (2, 1) if position is RoPEppEH else (4, 2)
    plain_sizes = ModelConfig(50, 32, 2, *sizes, 48, head_size=8, init_std=0.2)
    plain = Transformer(plain_sizes, RoPE(), seed=5).eval()
    torch.testing.assert_close(model(ids()), plain(ids()), atol=1e-5, rtol=0)
    total, _ = model.loss(ids()[:, :-1], ids()[:, 1:])
    total.backward()
    for a, b in zip(model.blocks(), plain.blocks(), strict=True):
        weight = a.self_attn.o_proj.weight
        places = places_of(model.layout, plain.layout)
        assert torch.equal(
            weight.unflatten(1, (-1, 8))[:, places].flatten(1), b.self_attn.o_proj.weight
        )
        assert (weight.grad.unflatten(1, (-1, 8)).abs().amax((0, 2)) > 0).all()


def test_the_scale_of_a_beginning_as_rope_is_ropes() -> None:
    rule = {"std": {"gain": 0.5, "heads": 0.5, "depth": 0.5}}
    config = ModelConfig(50, 32, 2, 4, 2, 48, o_proj=rule)  # type: ignore[arg-type]
    ec, rope = (Transformer(config, x) for x in (RoPEppEC(start_as_rope=True), RoPE()))
    real = ec.layers[0].self_attn.o_proj.weight.unflatten(1, (-1, 8))[:, ::2].flatten(1)
    assert torch.equal(real, rope.layers[0].self_attn.o_proj.weight)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(RoPE(), tmp_path)
    file, position = tmp_path / "ec.ckpt", written(RoPEppEC(), tmp_path)
    command.main([str(source), str(file), "--position", str(position)])
    out = capsys.readouterr().out
    assert "8 attention heads of 4 projections" in out
    assert f"written to {file}: for --init_from" in out
    with pytest.raises(InputError, match="exists"):
        command.main([str(source), str(file), "--position", str(position)])


def test_other_phases_are_said(tmp_path: Path) -> None:
    network = Transformer(CONFIG, HeadSplit())
    with pytest.warns(UserWarning, match="another function in HeadSplit"):
        load_weights(network, checkpoint(RoPE(), tmp_path))


def test_the_rope_of_a_seed_is_in_the_real_heads() -> None:
    rope = Transformer(CONFIG, RoPE())
    for phases in ((0.0, -90.0), (-90.0, 360.0)):
        spec = Phases(phases=phases, start_as_rope=True)
        torch.testing.assert_close(Transformer(CONFIG, spec)(ids()), rope(ids()))
    with pytest.raises(InputError, match="needs a phase of 0"):
        Transformer(CONFIG, Phases(phases=(-90.0, 45.0), start_as_rope=True))
