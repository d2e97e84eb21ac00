"""The estimate: against numbers worked out by hand, and against what real models allocate."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers.fit_runs import arguments
from helpers.golden_data import REPOSITORY
from ropepp.cli import main
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError
from ropepp.model.loss import cross_entropy_sum
from ropepp.model.transformer import Transformer
from ropepp.train.estimate import (
    Estimate,
    _loss_bytes,
    estimate,
    plan_run,
    trace_activations,
)

PUBLISHED = [
    f"--config={REPOSITORY}/configs/experiment/pretrain_376m.yaml",
    f"--model.position={REPOSITORY}/configs/position/ec.yaml",
    "--trainer.strategy=ddp",
    "--trainer.devices=auto",
]
V, M, L, F = 128256, 1024, 8, 3584
D, P, K, H = 128, 8, 4, 16  # EC attends twice with each projection
BLOCK = M * D * (P + 2 * K + H) + 3 * M * F + 2 * M
PARAMETERS = 384_320_512
FSDP2 = "--trainer.strategy=ropepp.train.strategy.FSDP2Strategy"


def published(*args: str, devices: int = 8, nodes: int | None = None, **kwargs: Any) -> Estimate:
    return estimate(plan_run([*PUBLISHED, *args], devices, nodes), **kwargs)


def test_the_published_model_by_hand() -> None:
    found = published()
    assert found["model"]["parameters"] == PARAMETERS == L * BLOCK + 2 * V * M + M
    assert found["model"]["parameters_per_block"] == BLOCK
    assert found["model"]["parameters_outside_blocks"] == 2 * V * M + M
    assert found["model"]["kv_cache_bytes_per_token"] == 2 * L * K * D * 2
    memory = found["memory"]
    assert memory["weights"] == memory["gradients"] == 1_537_282_048
    assert memory["gradient_buckets"] == 1_537_282_048
    assert memory["optimizer"] == 3_074_564_096
    assert memory["gathered"] == memory["recomputed"] == 0
    assert memory["loss"] == 8 * 2048 * V + 2 * 8 * 4096 * M + 4 * V * M + 2 * V * M
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert found["checkpoints"] == {
        "written": 90,
        "kept": 2,
        "bytes_each": 4_611_846_144,  # 12 bytes a parameter
        "bytes_kept": 9_223_692_288,
    }


def test_the_published_run_by_hand() -> None:
    found = published(mfu=0.5, peak_tflops=100.0)
    run = found["run"]
    assert (run["devices"], run["data_parallel"], run["micro_batches_per_step"]) == (8, 8, 2)
    assert run["tokens_per_step"] == 4096 * 128
    assert run["tokens"] == 90_000 * 4096 * 128 == found["data"]["tokens"]
    assert found["data"]["rows"] == 90_000 * 128
    assert found["data"]["epochs"] is None
    weights = L * (BLOCK - 2 * M) + M * V
    per_token = 6 * weights + 6 * L * H * D * 4097
    assert (
        found["model"]["training_flops_per_token"] == per_token == pytest.approx(1.9206e9, rel=1e-4)
    )
    assert run["hours"] == pytest.approx(run["tokens"] * per_token / (0.5 * 100e12 * 8) / 3600)
    assert published(devices=4, nodes=4)["run"]["hours"] == pytest.approx(
        published()["run"]["hours"] / 2
    )


def test_sharding_divides_what_lasts() -> None:
    whole, ddp = published(FSDP2)["memory"], published()["memory"]
    for item, each in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert whole[item] == each * PARAMETERS // 8
    assert whole["gradient_buckets"] == 0
    # Two micro-batches add up their gradients; the output layer comes in bfloat16 as blocks do.
    assert whole["gathered"] == 2 * 2 * BLOCK + 2 * V * M + 4 * PARAMETERS
    assert ddp["loss"] - whole["loss"] == 2 * V * M
    once = published(FSDP2, "--data.micro_batch_size=16")["memory"]
    assert once["gathered"] == (2 * 2 + 4) * BLOCK + (2 + 4) * V * M
    # Matrices come in bfloat16: no copies of them are kept for the backward pass.
    assert ddp["activations"] - whole["activations"] == 2 * L * (BLOCK - 2 * M)
    hybrid = published(FSDP2, "--trainer.strategy.shard_size=4")["memory"]
    assert hybrid["weights"] == PARAMETERS
    staying = published(FSDP2, "--trainer.strategy.reshard_after_forward=false")["memory"]
    assert staying["gathered"] - whole["gathered"] == (L - 2) * 2 * BLOCK


def test_processes_that_share_rows() -> None:
    n, size = 2, 2
    shared = published(FSDP2, f"--trainer.strategy.context_parallel_size={n}")
    assert (shared["run"]["data_parallel"], shared["run"]["micro_batches_per_step"]) == (4, 4)
    half = published(FSDP2, "--data.sequence_length=2048")["memory"]["activations"]
    tokens = 8 * 4096 // n
    others = (n - 1) * 2 * tokens * K * D * size  # their keys and values
    output = tokens * H * D * size  # of two pieces, put together
    assert shared["memory"]["activations"] == half + L * (others + output)


def test_muon_keeps_one_moment_of_the_matrices_in_blocks() -> None:
    found = published(f"--model.optimizer={REPOSITORY}/configs/optimizer/muon.yaml")
    saved = 4 * L * (BLOCK - 2 * M)
    assert found["memory"]["optimizer"] == 8 * PARAMETERS - saved
    assert found["checkpoints"]["bytes_each"] == 12 * PARAMETERS - saved


@pytest.mark.parametrize(
    ("args", "written", "kept"),
    [
        (["--checkpoint.every_n_steps=0"], 1, 1),
        (["--checkpoint.every_n_steps=80000"], 2, 2),
        (["--checkpoint.keep=0"], 90, 90),
        (["--checkpoint.every_n_steps=7", "--trainer.max_steps=20", "--checkpoint.keep=3"], 3, 3),
    ],
)
def test_checkpoints(args: list[str], written: int, kept: int) -> None:
    found = published("--model.schedule.warmup_steps=0", *args)["checkpoints"]
    assert (found["written"], found["kept"]) == (written, kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.max_epochs", 3),
        ("trainer.limit_train_batches", 10),
        ("trainer.gradient_clip_val", -1.0),
        ("metrics.every_n_steps", 0),
        ("guard.stop_after", 0),
        ("suite.rows", 0),
    ],
)
def test_refuses_what_fit_refuses(key: str, value: float, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{key} is {value}"):
        plan_run([*small(corpus, tmp_path), f"--{key}={value}"])


def small(corpus: Path, tmp_path: Path, **changes: Any) -> list[str]:
    return arguments(corpus, tmp_path / "logs", "run", **changes)[1:]


def saved_by_a_real_model(args: list[str]) -> int:
    """Bytes of the distinct storages, parameters aside, that autograd saves in ``Transformer.loss``
    on the CPU, without what the loss itself saves: the gradients of hidden states and head."""
    plan = plan_run(args)
    meta, B, T = plan.module.network, plan.data.micro_batch_size, plan.data.sequence_length
    network = Transformer(meta.config, meta.position, compute_dtype=meta.compute_dtype)
    ids = torch.randint(meta.config.vocab_size, (B, T))
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = network.loss(ids, ids, torch.arange(T).expand(B, T).contiguous())
    assert loss.requires_grad
    width = meta.config.hidden_size
    return (
        sum(sizes.values())
        - B * T * width * plan.dtype.itemsize
        - meta.config.vocab_size * width * 4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["RoPE", "RoPEppEC", "RoPEppEH", "FoPE", "ALiBi", "NoPE"])
def test_activations_are_those_of_a_real_model(
    position: str, dtype: str, corpus: Path, tmp_path: Path
) -> None:
    changes = {"model__position": position, "model__compute_dtype": dtype}
    args = small(corpus, tmp_path, **changes)
    real = saved_by_a_real_model(args)
    assert estimate(plan_run(args))["memory"]["activations"] == pytest.approx(real, rel=0.01)


def test_recomputing_blocks_keep_their_input() -> None:
    full, half, all_ = (
        published(f"--model.activation_checkpointing={n}")["memory"] for n in (0, 2, 1)
    )
    in_block, elsewhere = trace_activations(plan_run(PUBLISHED, 8))
    block_input = 8 * 4096 * M * 2
    assert full["activations"] == elsewhere + L * in_block
    assert half["activations"] == elsewhere + L // 2 * (in_block + block_input)
    assert all_["activations"] == elsewhere + L * block_input
    assert (full["recomputed"], half["recomputed"], all_["recomputed"]) == (0, 0, in_block)
    assert all_["total"] < half["total"] < full["total"]
    # Nothing is computed again while the loss is: the total has the larger of both.
    long = published("--model.activation_checkpointing=1", "--data.sequence_length=8192")["memory"]
    assert long["recomputed"] > long["loss"]
    assert long["total"] == sum(long.values()) - long["total"] - long["loss"]


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if id(storage) not in given:
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def free(self, size: int) -> None:
        self.live -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_what_is_alive_after_a_real_forward_pass(every: int, corpus: Path, tmp_path: Path) -> None:
    """All that is allocated, the loss's two gradients included, hidden states and head."""
    changes = {"model__activation_checkpointing": every, "data__sequence_length": 256}
    plan = plan_run(small(corpus, tmp_path, **changes))
    network = Transformer(plan.module.network.config, plan.module.network.position)
    network.set_recompute(every)
    ids = torch.randint(257, (4, 256))
    positions = torch.arange(256).expand(4, 256).contiguous()
    with Allocations() as real:
        loss, _ = network.loss(ids, ids, positions)
    assert loss.requires_grad
    of_loss = 4 * 4 * 256 * 32 + 4 * 257 * 32
    found = estimate(plan)["memory"]["activations"]
    assert found + of_loss == pytest.approx(real.live, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 384])
def test_the_loss_takes_what_it_really_takes(
    width: int, dtype: str, corpus: Path, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 4000, "hidden_size": width, "num_layers": 1, "ffn_size": 16}
    heads = {"num_heads": 4, "num_kv_heads": 2}
    changes = {"model__network": sizes | heads, "model__compute_dtype": dtype}
    plan = plan_run(small(corpus, tmp_path, **changes))
    hidden = torch.randn(600, width, dtype=plan.dtype, requires_grad=True)
    weight = torch.randn(4000, width, requires_grad=True)
    targets = torch.randint(4000, (600,))
    with Allocations() as real:
        cross_entropy_sum(hidden, weight, targets).backward()
    assert _loss_bytes(plan, 600) == pytest.approx(real.peak, rel=0.15)


def test_epochs_of_a_corpus_and_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    found = estimate(plan_run(small(corpus, tmp_path)))
    rows = -(-(Corpus.open(corpus, "train").meta.tokens - 1) // 32)
    assert found["data"]["epochs"] == pytest.approx(20 * 8 / rows)
    assert found["run"]["strategy"] == "single"
    missing = estimate(plan_run(small(tmp_path / "absent", tmp_path)))
    assert missing["data"] == {**found["data"], "epochs": None}
    assert missing["memory"] == found["memory"]
    assert not list(tmp_path.iterdir())


def test_devices_of_the_configuration() -> None:
    assert plan_run([*PUBLISHED, "--trainer.devices=4"]).processes.total == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "trainer.devices is 'auto', no number: give --devices"),
        (["--trainer.devices=[0,1]"], "give --devices"),
        (["--trainer.devices=-1"], "give --devices"),
        (["--devices=0"], "devices is 0"),
        (["--devices=3"], "it must be a multiple of 24: 120 or 144"),
        (["--devices=eight"], "invalid int value: 'eight'"),
        (["--devices=8", "--model.depth=3"], "--model.depth=3"),
        (["--devices=8", "--data.micro_batch=3"], "micro_batch"),
        (["--devices=8", "--trainer.max_steps=0"], "max_steps is 0"),
        (["--devices=8", "--trainer.max_steps=100"], "warmup_steps is 500"),
        (["--devices=8", "--trainer.precision=bf16-mixed"], "choose model.compute_dtype"),
        (["--devices=8", "--trainer.accumulate_grad_batches=3"], "and is 2 here"),
        (["--devices=8", "--trainer.strategy=deepspeed"], "estimate knows auto, ddp and fsdp2"),
        (["--devices=8", FSDP2, "--trainer.strategy.shard_size=3"], "shard_size is 3"),
        (["--devices=8", FSDP2, "--trainer.strategy.context_parallel_size=8",
          "--data.sequence_length=4104"], "a multiple of 16"),
        (["--devices=8", "--model.backend=quantum"], "backend is 'quantum'"),
        (["--devices=8", "--mfu=1.5"], "mfu is 1.5"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    args: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *PUBLISHED, *args]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert words in captured.err
    assert captured.out == ""


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    config = f"{REPOSITORY}/configs/experiment/pretrain_376m.yaml"
    command = ["estimate", config, *PUBLISHED[1:], "--devices", "8"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == published()
    assert main([*command, "--device_memory_gb", "20"]) == 0
    captured = capfd.readouterr()
    assert "384,320,512" in captured.out
    assert "1.537 GB" in captured.out
    assert "an H100 SXM has 989.4" in captured.out
    assert captured.err == "warning: 23.34 GB exceed 20 GB\n"
    assert main([*command, "--device_memory_gb", "80"]) == 0
    assert capfd.readouterr().err == ""
