"""Sharded models against whole ones: gradients, clipping, recomputation, compilation, precision,
and rows shared by processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from helpers.processes import spawn
from ropepp.model import ModelConfig, Transformer
from ropepp.model import positions as variants
from ropepp.model.positions import ALiBi, FoPE, Position, RoPE, RoPEppEC, RoPEppEH
from ropepp.model.sequence import SequenceGroup
from ropepp.train.strategy import shard

CONFIG = ModelConfig(97, 32, 2, 4, 2, 48, head_size=8)
B, T = 4, 32
Grads = dict[str, Tensor]


def batch(packed: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Ids, targets (some left out), and packed documents of uneven lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (B, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[:, 5:9] = -100
    targets[0, 10:] = -100  # a process with few targets must not count more
    if not packed:
        return ids[:, :-1], targets, None, None
    starts = torch.rand((B, T), generator=generator) < 0.15
    documents = starts.long().cumsum(dim=1)
    positions = torch.arange(T).expand(B, T)
    begin = positions.where(starts, 0).cummax(dim=1).values
    return ids[:, :-1], targets, positions - begin, documents


def whole_model(position: Position, **options: Any) -> Transformer:
    return Transformer(CONFIG, position, seed=3, **options)


def sharded_model(
    position: Position,
    mesh: Any = None,
    prepare: Callable[[Transformer], None] | None = None,
    config: ModelConfig = CONFIG,
    **options: Any,
) -> Transformer:
    """As the LightningModule does it: from the meta device, prepared, sharded, drawn."""
    with torch.device("meta"):
        model = Transformer(config, position, **options)
    if prepare is not None:
        prepare(model)
    shard(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    model.initialize(3)
    return model


def own_rows(rows: Any) -> Any:
    """This process's rows of a batch."""
    n = B // dist.get_world_size()
    part = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)
    return [None if x is None else x[part] for x in rows]


def gradients(model: Transformer, rows: Any, scale: float, steps: int = 1) -> tuple[Tensor, Grads]:
    """Loss over all processes and the gradients of the mean over ``scale`` targets."""
    for _ in range(steps):
        model.zero_grad()
        total, _ = model.loss(*rows)
        (total * scale).backward()
    loss = total.detach().clone()
    if any(isinstance(p, DTensor) for p in model.parameters()):
        dist.all_reduce(loss)
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return loss, grads


def assert_equal(a: tuple[Tensor, Grads], b: tuple[Tensor, Grads], tolerance: float) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=0)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        size = b[1][name].abs().max().item()
        torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=tolerance * size, msg=name)


def check_gradients() -> None:
    world, rows = dist.get_world_size(), batch()
    for position in (RoPE(), RoPEppEC(), RoPEppEH(), FoPE()):
        expected = gradients(whole_model(position), rows, 1.0)
        model = sharded_model(position)
        for name, value in whole_model(position).state_dict().items():
            own = model.state_dict()[name]
            own = own.full_tensor() if isinstance(own, DTensor) else own
            assert torch.equal(own, value), name  # drawn whole, then cut
        found = gradients(model, own_rows(rows), float(world))  # FSDP averages
        assert_equal(found, expected, 2e-6)


def check_clipping() -> None:
    world, rows = dist.get_world_size(), batch()
    whole, model = whole_model(RoPEppEC()), sharded_model(RoPEppEC())
    gradients(whole, rows, 1.0)
    gradients(model, own_rows(rows), float(world))
    norms = []
    for one in (whole, model):
        grads = [p.grad for p in one.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(one.parameters(), 0.01, norm)
        norms.append(norm)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert isinstance(a.grad, DTensor)
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-7)


def check_recomputation_and_compilation() -> None:
    world, rows = dist.get_world_size(), own_rows(batch())

    def compile_blocks(model: Transformer) -> None:
        for block in model.blocks():
            block.compile(dynamic=False)

    def both(model: Transformer) -> None:
        model.set_recompute(1)
        compile_blocks(model)

    plain = gradients(sharded_model(RoPEppEC()), rows, float(world))
    again = sharded_model(RoPEppEC(), prepare=lambda model: model.set_recompute(2))
    assert [block.recompute for block in again.blocks()] == [True, False]
    assert_equal(gradients(again, rows, float(world)), plain, 0)
    for prepare in (compile_blocks, both):
        model = sharded_model(RoPEppEC(), prepare=prepare)
        assert_equal(gradients(model, rows, float(world), steps=2), plain, 2e-6)
        assert not [name for name, _ in model.named_parameters() if "_orig_mod" in name]


def check_bfloat16() -> None:
    """One definition of mixed precision: in one process, sharded or not, the same bits."""
    rows = batch()
    expected = gradients(whole_model(RoPEppEC(), compute_dtype=torch.bfloat16), rows, 1.0)
    model = sharded_model(RoPEppEC(), compute_dtype=torch.bfloat16)
    if dist.get_world_size() == 1:
        found = gradients(model, rows, 1.0)
        assert_equal(found, expected, 0)
    else:
        found = gradients(model, own_rows(rows), float(dist.get_world_size()))
        assert_equal(found, expected, 2e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


def check_tied() -> None:
    config = ModelConfig(97, 32, 2, 4, 2, 48, head_size=8, tied_embeddings=True)
    whole = Transformer(config, RoPE(), seed=3)
    model = sharded_model(RoPE(), config=config)
    assert model.lm_head.weight is model.embed_tokens.weight
    expected = gradients(whole, batch(), 1.0)
    found = gradients(model, own_rows(batch()), float(dist.get_world_size()))
    assert_equal(found, expected, 2e-6)


def check_hybrid() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    expected = gradients(whole_model(RoPEppEH()), batch(), 1.0)
    model = sharded_model(RoPEppEH(), mesh=mesh)
    weight = model.blocks()[0].mlp.up_proj.weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == 24  # half, not a quarter
    assert_equal(gradients(model, own_rows(batch()), 4.0), expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        check_gradients,
        check_clipping,
        check_recomputation_and_compilation,
        check_bfloat16,
        check_tied,
    ],
)
def test_two_processes(check: Callable[[], None]) -> None:
    spawn(2, check)


@pytest.mark.slow
def test_bfloat16_in_one_process() -> None:
    spawn(1, check_bfloat16)


@pytest.mark.slow
def test_hybrid_sharding() -> None:
    spawn(4, check_hybrid)


def shared_gradients(position: Position, packed: bool) -> None:
    rows, world = batch(packed), dist.get_world_size()
    expected = gradients(whole_model(position), rows, 1.0)
    model = sharded_model(position)
    assert dist.group.WORLD is not None
    model.sequence = SequenceGroup(dist.group.WORLD)
    assert_equal(gradients(model, rows, float(world)), expected, 5e-6)
    with torch.no_grad():  # the logits of the own tokens
        logits = whole_model(position)(rows[0], *rows[2:])
        torch.testing.assert_close(
            model(rows[0], *rows[2:]), model.sequence.split(logits), rtol=0, atol=1e-5
        )


def check_shared_rows() -> None:
    for position in (RoPE(), RoPEppEC(), RoPEppEH(), ALiBi(), FoPE()):
        for packed in (False, True):
            shared_gradients(position, packed)


def check_shared_all_variants() -> None:
    assert dist.group.WORLD is not None
    sequence = SequenceGroup(dist.group.WORLD)
    bytes_of = {
        name: sequence.bytes_gathered(B, T, kind().layout(4, 2).num_kv_heads, 8, 4)
        for name, kind in (("RoPE", RoPE), ("EC", RoPEppEC), ("EH", RoPEppEH))
    }
    assert bytes_of["EC"] == bytes_of["RoPE"] == 2 * bytes_of["EH"]
    for name in ("HeadSplit", "PartialDoubling", "Phases", "Pythia", "NoPE"):
        shared_gradients(getattr(variants, name)(), packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_shared_rows, check_shared_all_variants])
def test_shared_rows(check: Callable[[], None]) -> None:
    spawn(2, check)


def check_pieces() -> None:
    """Both halves of the work: every process has as many visible pairs as the others."""
    assert dist.group.WORLD is not None
    sequence = SequenceGroup(dist.group.WORLD)
    pairs = [sum(range(a + 1, b + 1)) for a, b in sequence.spans(T)]
    total = torch.tensor(float(sum(pairs)))
    dist.all_reduce(total)
    assert total == T * (T + 1) // 2 == sum(pairs) * sequence.size
    x = torch.arange(B * T).view(B, T).float()
    k, v = sequence.gather(*(sequence.split(y).view(B, -1, 1, 1) for y in (x, -x)))
    assert torch.equal(k.view(B, T), x)
    assert torch.equal(v.view(B, T), -x)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_pieces(world: int) -> None:
    spawn(world, check_pieces)
