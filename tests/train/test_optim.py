"""Muon and AdamW as one optimizer: against the two alone, resumed, on shards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from helpers.fit_runs import curve, fit
from helpers.golden_data import REPOSITORY
from helpers.processes import warm_children
from ropepp.errors import InputError
from ropepp.model import ModelConfig, Transformer
from ropepp.model.plain import from_plain, to_plain
from ropepp.model.positions import RoPEppEC
from ropepp.train.optim import AdamW, Muon

# 41 rows do not divide evenly by two processes.
CONFIG = ModelConfig(51, 36, 2, 6, 3, 41, init_std=0.3)
SPEC = Muon(lr=0.02, weight_decay=0.2)
# Small enough that a last bit of a gradient, which may flip bits of bfloat16, stays below 1e-5, and
# large enough that sums of bfloat16 over processes, as torch.optim.Muon takes them, do not.
SMALL_STEPS = Muon(lr=0.001, weight_decay=0.2)


def model() -> Transformer:
    return Transformer(CONFIG, RoPEppEC(), seed=3)


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def backward(network: nn.Module) -> None:
    ids = torch.randint(51, (2, 12), generator=torch.Generator().manual_seed(5))
    logits = network(ids).flatten(0, 1)
    nn.functional.cross_entropy(logits, ids.flatten().roll(-1)).backward()


def weights(network: nn.Module) -> dict[str, Tensor]:
    whole = {}
    for name, value in network.state_dict().items():
        whole[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return whole


def in_blocks(network: nn.Module, inside: bool) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if (name.startswith("layers.") and parameter.ndim == 2) == inside
    ]


def test_equals_the_two_alone() -> None:
    one, two = model(), model()
    optimizer = SPEC.build(one)
    muon = torch.optim.Muon(
        [parameter for _, parameter in in_blocks(two, True)],
        lr=0.02,
        weight_decay=0.2,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = AdamW(lr=0.02, weight_decay=0.2).over(two, in_blocks(two, False))
    assert len(muon.param_groups[0]["params"]) == 14
    assert [len(group["params"]) for group in adamw.param_groups] == [2, 5]
    for step in range(3):
        for network in (one, two):
            set_gradients(network, step)
        for each in (optimizer, muon, adamw):
            each.step()
    for name, want in weights(two).items():
        assert torch.equal(weights(one)[name], want), name
    assert weights(one).keys() == weights(model()).keys()


def test_adamw_part_equals_the_adamw_spec() -> None:
    one, two = model(), model()
    optimizers = Muon(lr=0.01).build(one), AdamW(lr=0.01).build(two)
    for step in range(3):
        for network, optimizer in zip((one, two), optimizers, strict=True):
            set_gradients(network, step)
            optimizer.step()
    same = {name for name, want in weights(two).items() if torch.equal(weights(one)[name], want)}
    assert same == {name for name, _ in in_blocks(model(), False)}


@pytest.mark.parametrize("distributed", [False, True], ids=["own", "distributed checkpoint"])
def test_continues_from_its_state(distributed: bool) -> None:
    """Bit for bit, with a schedule, in a fresh optimizer with other settings."""

    def train(network: nn.Module, schedule: LambdaLR, steps: range) -> None:
        for step in steps:
            set_gradients(network, step)
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()

    def schedule(network: nn.Module, spec: Muon = SPEC) -> LambdaLR:
        return LambdaLR(spec.build(network), lambda step: 1 / (1 + step))

    whole = model()
    train(whole, schedule(whole), range(5))

    first = model()
    before = schedule(first)
    assert before.base_lrs == [0.02] * 3
    train(first, before, range(2))
    second = model()
    second.load_state_dict(first.state_dict())
    after = schedule(second, Muon(lr=9.0, momentum=0.1, adam_betas=(0.1, 0.2)))
    if distributed:
        state = get_optimizer_state_dict(first, before.optimizer)
        assert {group["part"] for group in state["param_groups"]} == {"muon", "adamw"}
        set_optimizer_state_dict(second, after.optimizer, copy.deepcopy(state))
    else:
        after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    after.load_state_dict(before.state_dict())
    train(second, after, range(2, 5))
    for name, want in weights(whole).items():
        assert torch.equal(weights(second)[name], want), name


def test_closure_runs_once() -> None:
    network, calls = model(), []
    optimizer = SPEC.build(network)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        backward(network)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7
    assert calls == [1]
    assert all(
        not torch.equal(weights(network)[name], value) for name, value in weights(model()).items()
    )


def test_without_gradient_untouched() -> None:
    network = model()
    optimizer = SPEC.build(network)
    set_gradients(network, 0)
    still = ["layers.0.mlp.up_proj.weight", "layers.1.input_layernorm.weight", "lm_head.weight"]
    for name in still:
        network.get_parameter(name).grad = None
    optimizer.step()
    for name, value in weights(model()).items():
        assert torch.equal(weights(network)[name], value) == (name in still)
        assert (network.get_parameter(name) in optimizer.state) == (name not in still)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"adam_betas": (0.9, 1.0)}, "betas"),
        ({"adam_eps": -1e-8}, "eps"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message} is "):
        Muon(**changes)


def test_shipped_configurations() -> None:
    paths = {path.stem: path for path in (REPOSITORY / "configs/optimizer").glob("*.yaml")}
    specs = {}
    for name, path in paths.items():
        plain = yaml.safe_load(path.read_text())
        plain["class_path"] = f"ropepp.train.optim.{plain['class_path']}"
        specs[name] = from_plain(plain)
    assert specs == {"adamw": AdamW(), "muon": Muon()}
    assert from_plain(to_plain(SPEC)) == SPEC


@pytest.mark.parametrize(
    "class_path",
    [
        "pathlib.Path",
        "ropepp.interop.export.Path",  # imported there
        "ropepp.data.recall.task.RecallDataModule",
        "ropepp.train.optim.nothing",
    ],
)
def test_plain_data_make_specs_of_this_package_alone(class_path: str) -> None:
    with pytest.raises(InputError, match=f"class_path is '{class_path}'"):
        from_plain({"class_path": class_path, "init_args": {}})


def test_fit_and_resume(corpus: Path, tmp_path: Path) -> None:
    """By the command line; new settings win over those of the checkpoint."""
    optimizer = str(REPOSITORY / "configs/optimizer/muon.yaml")
    changes = {
        "model__optimizer": optimizer,
        "trainer__max_steps": 10,
        "model__optimizer__lr": None,
    }
    changes["data__validate_every_n_steps"] = 5
    whole = fit(corpus, tmp_path, "whole", **changes)
    middle = str(next((whole / "checkpoints").glob("step-*5.ckpt")))
    resumed = fit(corpus, tmp_path, "resumed", ckpt_path=middle, **changes)
    late = [line for line in curve(whole) if line["step"] > 5]
    assert late
    assert curve(resumed) == late
    changes["model__optimizer"] = '{"class_path": "Muon", "init_args": {"lr": 0.25}}'
    other = fit(corpus, tmp_path, "other", ckpt_path=middle, **changes)
    rates = [line["train/learning_rate"] for line in curve(other) if "train/loss" in line]
    assert rates == [0.25] * 5


@pytest.mark.slow
def test_shards_equal_the_whole(tmp_path: Path) -> None:
    whole = model()
    optimizer = SMALL_STEPS.build(whole)
    for _ in range(3):
        optimizer.zero_grad()
        backward(whole)
        optimizer.step()
    torch.save(weights(whole), tmp_path / "whole.pt")
    with warm_children():
        torch.multiprocessing.spawn(on_shards, (tmp_path,), nprocs=2)


def on_shards(rank: int, folder: Path) -> None:
    """In each of two processes: three steps; two, saved, and the third by another optimizer."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        want = torch.load(folder / "whole.pt")
        mesh = init_device_mesh("cpu", (2,))
        network = model()
        for block in network.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        optimizer = SMALL_STEPS.build(network)
        for step in range(3):
            optimizer.zero_grad()
            backward(network)
            if step == 2:
                state = copy.deepcopy(get_optimizer_state_dict(network, optimizer))
                optimizer = Muon(lr=9.0).build(network)
                gradients = [parameter.grad for parameter in network.parameters()]
                optimizer.zero_grad()
                set_optimizer_state_dict(network, optimizer, state)
                for parameter, grad in zip(network.parameters(), gradients, strict=True):
                    parameter.grad = grad
            optimizer.step()
        matrix = network.get_parameter("layers.0.mlp.up_proj.weight")
        assert isinstance(optimizer.state[matrix]["momentum_buffer"], DTensor)
        for name, value in weights(network).items():
            torch.testing.assert_close(value, want[name], atol=1e-5, rtol=0)
    finally:
        dist.destroy_process_group()
