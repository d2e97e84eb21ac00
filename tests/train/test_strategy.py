"""Sharded models against whole ones: gradients, clipping, recomputation, compilation, precision,
and rows shared by processes."""

import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from helpers.processes import spawn
from ropepp.model import ModelConfig, Transformer
from ropepp.model import positions as variants
from ropepp.model.positions import ALiBi, FoPE, Position, RoPE, RoPEppEC, RoPEppEH
from ropepp.model.sequence import SequenceGroup
from ropepp.train.lightning_cli import TRAINER_DEFAULTS
from ropepp.train.module import LanguageModel
from ropepp.train.optim import AdamW
from ropepp.train.strategy import FSDP2Strategy, OneMachine, shard

CONFIG = ModelConfig(97, 32, 2, 4, 2, 48, head_size=8)
B, T = 4, 32
Grads = dict[str, Tensor]


def batch(
    packed: bool = True, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Ids, targets (some left out), and packed documents of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
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
    rows, scale = batch(), 0.3  # a gradient of the output layer in bfloat16 would be another
    expected = gradients(whole_model(RoPEppEC(), compute_dtype=torch.bfloat16), rows, scale)
    model = sharded_model(RoPEppEC(), compute_dtype=torch.bfloat16)
    if dist.get_world_size() == 1:
        found = gradients(model, rows, scale)
        assert_equal(found, expected, 0)
    else:
        found = gradients(model, own_rows(rows), scale * dist.get_world_size())
        assert_equal(found, expected, 2e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


def count_exchanges() -> Counter[str]:
    """Counts from now on how often shards are gathered and gradients reduced."""
    counts: Counter[str] = Counter()
    for kind in (collectives.DefaultAllGather, collectives.DefaultReduceScatter):

        def call(self: Any, *args: Any, _call: Any = kind.__call__, **kwargs: Any) -> Any:
            counts[type(self).__name__] += 1
            return _call(self, *args, **kwargs)

        kind.__call__ = call  # type: ignore[method-assign]
    return counts


def check_gathered_in() -> None:
    """Output layer and blocks in the compute dtype, what sums over tokens in float32; and how often
    in a step, of two blocks and the rest."""
    model, seen = sharded_model(RoPEppEC(), compute_dtype=torch.bfloat16), {}
    for name, module in model.named_modules():
        weight = "weight" in dict(module.named_parameters(recurse=False))
        if weight and name != "lm_head":
            module.register_forward_pre_hook(
                lambda module, _, name=name: seen.update({name: module.weight.dtype})
            )
    counts = count_exchanges()
    gradients(model, own_rows(batch()), 1.0)
    assert {seen.pop("embed_tokens"), seen.pop("norm")} == {torch.float32}
    assert set(seen.values()) == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32  # back in shards
    # A block's weights twice; embedding, norm and output layer once.
    assert counts == {"DefaultAllGather": 2 * 2 + 3, "DefaultReduceScatter": 2 + 3}


def check_tied() -> None:
    config = ModelConfig(97, 32, 2, 4, 2, 48, head_size=8, tied_embeddings=True)
    whole = Transformer(config, RoPE(), seed=3)
    model = sharded_model(RoPE(), config=config)
    assert model.lm_head.weight is model.embed_tokens.weight
    expected = gradients(whole, batch(), 1.0)
    found = gradients(model, own_rows(batch()), float(dist.get_world_size()))
    assert_equal(found, expected, 2e-6)


def accumulated(strategy: FSDP2Strategy) -> tuple[Tensor, Grads, list[int]]:
    """Loss and gradients of a step of four micro-batches, made as Lightning makes them, and the
    number of reductions after each."""
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "NODE_RANK": "0"}
    counts, after, grads = count_exchanges(), [], {}

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            for name, p in module.network.named_parameters():
                grads[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad

        def on_after_backward(self, *_: Any) -> None:
            after.append(counts["DefaultReduceScatter"])

    trainer = pl.Trainer(
        **{**TRAINER_DEFAULTS, "max_steps": 1},
        strategy=strategy,
        accelerator="cpu",
        devices=dist.get_world_size(),
        accumulate_grad_batches=4,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    keys = ("input_ids", "targets", "positions", "document_ids")
    rows = [own_rows(batch(seed=seed)) for seed in range(4)]
    batches = [dict(zip(keys, part, strict=True), num_targets=100) for part in rows]
    module = LanguageModel(CONFIG, RoPEppEC(), AdamW(lr=0.01), compute_dtype="bfloat16")
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return torch.zeros(()), grads, after


class AlwaysReduced(FSDP2Strategy):
    """Exchanges gradients after each micro-batch."""

    def block_backward_sync(self) -> AbstractContextManager[None]:
        return nullcontext()


def check_accumulation() -> None:
    *found, once = accumulated(FSDP2Strategy())
    *expected, always = accumulated(AlwaysReduced())
    if dist.get_world_size() > 1:  # blocks, embedding, norm, output layer
        assert once == [0, 0, 0, 5]
        assert always == [5, 10, 15, 20]
    assert_equal(found, expected, 2e-6 if dist.get_world_size() > 1 else 0)


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
        pytest.param(check_recomputation_and_compilation, marks=pytest.mark.extra),
        check_bfloat16,
        check_gathered_in,
        check_tied,
    ],
)
def test_two_processes(check: Callable[[], None]) -> None:
    spawn(2, check)


@pytest.mark.slow
def test_bfloat16_in_one_process() -> None:
    spawn(1, check_bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_reduced_once_a_step(world: int) -> None:
    spawn(world, check_accumulation)


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


def test_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside what the system lends, past what is taken, and where the environment says."""
    for key in ("MASTER_PORT", "STANDALONE_PORT"):
        monkeypatch.delenv(key, raising=False)
    trainer = pl.Trainer(strategy=FSDP2Strategy(), accelerator="cpu", devices=1, logger=False)
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, OneMachine)
    assert environment.world_size() == 1
    assert 20_000 <= environment.main_port < 32_768
    assert environment.main_port == environment.main_port

    with socket.socket() as taken:
        taken.bind(("", environment.main_port))
        taken.listen()
        order = [environment.main_port, *range(20_000, 21_000)]
        monkeypatch.setattr("random.SystemRandom.sample", lambda *_: order)
        assert OneMachine().main_port != environment.main_port
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert OneMachine().main_port == 1234
