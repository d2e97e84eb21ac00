"""Start and step of the output projections: off they are not there, on they are what was asked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ropepp.errors import InputError
from ropepp.interop.export import export
from ropepp.interop.saved import SavedModel
from ropepp.model import ModelConfig, Transformer
from ropepp.model.folders.published import load_pretrained
from ropepp.model.positions import Phases, Position, RoPE, RoPEppEC, RoPEppEH
from ropepp.model.scale import MatrixScale, ScaleRule
from ropepp.train.optim import AdamW, Muon, OptimizerSpec

PLAIN = ModelConfig(61, 32, 3, 4, 2, 48)
FAN_IN = MatrixScale(std=ScaleRule(fan_in=0.5), step=ScaleRule(fan_in=1.0))


def scaled(o_proj: MatrixScale, down_proj: MatrixScale | None = None) -> ModelConfig:
    return replace(PLAIN, o_proj=o_proj, down_proj=down_proj or MatrixScale())


def changes(config: ModelConfig, position: Position, optimizer: OptimizerSpec) -> dict[str, Tensor]:
    """How far each tensor moves in one step, given equal gradients."""
    model = Transformer(config, position, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.build(model).step()
    return {name: tensor - before[name] for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC(), RoPEppEH(), Phases(phases=(0, 0, 90))])
def test_factors_follow_the_layout_and_the_depth(position: Position) -> None:
    ratio = position.layout(4, 2).num_heads / position.layout(4, 2).num_projections
    rule = MatrixScale(ScaleRule(0.5, heads=0.5, depth=0.5), ScaleRule(2.0, heads=1.0, depth=0.25))
    model, plain = Transformer(scaled(rule, rule), position), Transformer(PLAIN, position)
    for block, other in zip(model.blocks(), plain.blocks(), strict=True):
        o, down = block.self_attn.o_proj, block.mlp.down_proj
        assert o.step == pytest.approx(2.0 / ratio / 6**0.25)
        assert down.step == pytest.approx(2.0 / 6**0.25)
        wanted = 0.5 / (ratio * 6) ** 0.5 * other.self_attn.o_proj.weight
        torch.testing.assert_close(o.weight, wanted)
        torch.testing.assert_close(down.weight, 0.5 / 6**0.5 * other.mlp.down_proj.weight)
        torch.testing.assert_close(block.mlp.up_proj.weight, other.mlp.up_proj.weight)


def test_off_is_the_plain_model_to_the_bit() -> None:
    one, two = (Transformer(config, RoPEppEC()) for config in (PLAIN, scaled(MatrixScale())))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    groups = AdamW().build(two).param_groups
    assert [len(group["params"]) for group in groups] == [23, 7]  # as ever: matrices, norms
    # Where heads read as much as the model is wide, the rule by fan-in changes nothing.
    for position in (RoPE(), RoPEppEH()):
        plain, ruled = (Transformer(config, position) for config in (PLAIN, scaled(FAN_IN)))
        pairs = zip(plain.parameters(), ruled.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_fan_in_is_what_a_matrix_reads() -> None:
    """EC, and RoPE with twice the heads; the feed-forward layer's own."""
    wide = replace(scaled(FAN_IN, FAN_IN), num_heads=8, num_kv_heads=4, head_size=8)
    for config, position in ((scaled(FAN_IN, FAN_IN), RoPEppEC()), (wide, RoPE())):
        block = Transformer(config, position).blocks()[0]
        assert (block.self_attn.o_proj.step, block.self_attn.o_proj.std) == (0.5, 0.5**0.5)
        assert block.mlp.down_proj.step == pytest.approx(32 / 48)


@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize("gain", [2.0, 0.5, 0.0])
def test_a_step_is_as_long_as_asked(kind: type[OptimizerSpec], gain: float) -> None:
    optimizer = kind(lr=0.01, weight_decay=0.0)  # type: ignore[call-arg]
    usual = changes(PLAIN, RoPEppEC(), optimizer)
    moved = changes(scaled(MatrixScale(step=ScaleRule(gain))), RoPEppEC(), optimizer)
    for name, change in usual.items():
        own = gain if name.endswith("o_proj.weight") else 1.0
        torch.testing.assert_close(moved[name], own * change, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_weight_decay_does_not_follow_the_step(kind: type[OptimizerSpec]) -> None:
    config = scaled(MatrixScale(step=ScaleRule(0.25)))
    without, with_decay = (
        changes(config, RoPEppEC(), kind(lr=0.01, weight_decay=decay))  # type: ignore[call-arg]
        for decay in (0.0, 0.5)
    )
    before = Transformer(config, RoPEppEC(), seed=1).state_dict()
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.self_attn.q_proj.weight"):
        decayed = with_decay[name] - without[name]
        torch.testing.assert_close(decayed, -0.01 * 0.5 * before[name], rtol=1e-2, atol=1e-7)


def test_a_model_used_as_c_times_w_trains_alike() -> None:
    """Adam with step c on U is Adam on W where U = c W: three steps against a model that
    multiplies."""
    c = 0.25
    ours = Transformer(scaled(MatrixScale(step=ScaleRule(c))), RoPEppEC(), seed=1).double()
    theirs = Transformer(PLAIN, RoPEppEC(), seed=1).double()
    for block in theirs.blocks():
        block.self_attn.o_proj.weight.data /= c
        block.self_attn.o_proj.register_forward_hook(lambda module, inputs, out: c * out)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(5))
    optimizers = [AdamW(lr=1e-2, eps=1e-30).build(model) for model in (ours, theirs)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                model(ids).flatten(0, 1), ids.flatten().roll(-1)
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_frozen_at_zero_the_imaginary_heads_are_not_there() -> None:
    """EC whose imaginary columns of the output projection start at zero and stay there is RoPE."""
    rope, ec = (Transformer(PLAIN, position, seed=4) for position in (RoPE(), RoPEppEC()))
    masks = {}
    for block, other in zip(ec.blocks(), rope.blocks(), strict=True):
        wide = block.self_attn.o_proj.weight.data.unflatten(1, (4, 2, 8))
        wide[:, :, 0] = other.self_attn.o_proj.weight.data.unflatten(1, (4, 8))
        wide[:, :, 1] = 0.0
        mask = torch.zeros_like(wide)
        mask[:, :, 0] = 1.0
        masks[block.self_attn.o_proj.weight] = mask.flatten(1)
    for weight, mask in masks.items():
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    ids = torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(5))
    optimizers = [AdamW(lr=3e-3).build(model) for model in (rope, ec)]
    for _ in range(20):
        losses = []
        for model, optimizer in zip((rope, ec), optimizers, strict=True):
            optimizer.zero_grad()
            total, count = model.loss(ids[:, :-1], ids[:, 1:])
            (total / count).backward()
            optimizer.step()
            losses.append((total / count).item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[0] < 3.9  # it has learned something


def test_exports_carry_it(tmp_path: Path) -> None:
    model = Transformer(scaled(FAN_IN), RoPEppEC(), seed=1)
    saved = SavedModel(model.eval(), tmp_path, None, None, {})
    export(saved, tmp_path / "out", "hf")
    back = load_pretrained(tmp_path / "out")
    assert back.config == model.config
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(back(ids), model(ids))


@pytest.mark.parametrize("name", ["gain", "heads", "depth"])
def test_refuses_what_is_no_number(name: str) -> None:
    with pytest.raises(InputError, match=name):
        ScaleRule(**{name: float("nan")})
    with pytest.raises(InputError, match="gain is -1"):
        ScaleRule(gain=-1.0)
