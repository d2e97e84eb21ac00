"""``ropepp estimate``: what a training run will need, before it starts and on any machine.

What lasts follows from shapes. What autograd keeps of a micro-batch is no formula: a block runs
once on tensors without memory (`FakeTensorMode`), as in the run, and what it saves is counted.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ropepp.data.loading.datamodule import CorpusDataModule, RowsDataModule, check_accumulation
from ropepp.data.loading.loader import Rows, TrainLoader
from ropepp.errors import InputError, at_least
from ropepp.model.attention import RMSNorm
from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters, training_flops
from ropepp.model.kernels import BACKENDS
from ropepp.model.loss import cached_rows, chunk_rows
from ropepp.model.sequence import check_length
from ropepp.model.transformer import Block, Transformer
from ropepp.runs.machine import PEAK_TFLOPS
from ropepp.train.callbacks.checkpoint import StepCheckpoint
from ropepp.train.lightning_cli import RopeppCLI
from ropepp.train.module import LanguageModel
from ropepp.train.optim import Muon, OptimizerSpec
from ropepp.train.strategy import FSDP2Strategy, check_sizes

PEAK = PEAK_TFLOPS["H100"]

# What the table says beside a value.
REMARKS = {
    "parameters_outside_blocks": "embedding, final norm, output layer",
    "kv_cache_bytes_per_token": "in bfloat16",
    "training_flops_per_token": "of full rows without document boundaries: an upper bound",
    "gradient_buckets": "ddp's copy for the exchange",
    "gathered": "whole parameters and gradients, fsdp2",
    "activations": "kept of a micro-batch; compiled blocks usually keep less",
    "total": "of the transient loss and recomputed, the larger; allocator and kernels add some",
    "peak_tflops_per_device": f"dense bfloat16; an H100 SXM has {PEAK:g}",
    "hours": "of training alone, without validation and checkpoints",
}


@dataclass(frozen=True)
class Processes:
    """Who computes what: ``total`` processes, one a device, that keep weights, gradients and
    optimizer state in ``shards`` parts, and of which ``context`` share a row."""

    strategy: str  # "single", "ddp" or "fsdp2"
    total: int
    shards: int = 1
    context: int = 1
    reshards: bool = True  # whether fsdp2 frees a block's parameters after its forward pass


@dataclass(frozen=True)
class PlannedRun:
    """A run as configured and checked, nothing allocated; without the corpus ``rows`` is None."""

    module: LanguageModel
    data: RowsDataModule
    checkpoint: StepCheckpoint
    processes: Processes
    max_steps: int
    accumulation: int
    dtype: torch.dtype
    on_gpu: bool
    rows: Rows | None


# A run's needs in plain values, see `estimate`.
Estimate = dict[str, dict[str, Any]]


class EstimateCLI(RopeppCLI):
    """Parses like ``fit``, and makes nothing that needs a device, data or a folder."""

    def before_instantiate_classes(self) -> None:
        """Touches neither the run's folder nor checkpoints."""

    def instantiate_classes(self) -> None:
        # The last ones for what they refuse.
        keys = ("model", "data", "checkpoint", "metrics", "guard", "profile", "suite")
        made = self._parser("fit").instantiate(Namespace({key: self.options[key] for key in keys}))
        self.model, self.datamodule, self.checkpoint = (made[key] for key in keys[:3])

    @property
    def data_is_there(self) -> bool:
        data = self.datamodule
        return not isinstance(data, CorpusDataModule) or all(Path(f).exists() for f in data.folders)

    def check(self) -> None:
        """Raises what ``fit`` would of module and trainer, without devices."""
        self._check_trainer()
        trainer = self.options.trainer
        precision = "32-true" if trainer.precision in (None, 32, "32") else trainer.precision
        data_vocab = self.datamodule.vocab_size if self.data_is_there else None
        self.model.check(precision, data_vocab, trainer.max_steps)

    def _set_seed(self) -> None:
        """Draws nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def plan_run(args: list[str], devices: int | None = None, nodes: int | None = None) -> PlannedRun:
    """Parses and checks the run ``ropepp fit ARGS``, with ``devices`` a node and ``nodes`` instead
    of the trainer's. An `InputError` or `ArgumentError` if ``fit`` would refuse it."""
    cli = EstimateCLI(["fit", *args])
    trainer, data = cli.options.trainer, cli.datamodule
    if devices is None and not str(trainer.devices).isdigit():
        raise InputError(f"trainer.devices is {trainer.devices!r}, no number: give --devices")
    devices = int(trainer.devices) if devices is None else devices
    nodes = trainer.num_nodes if nodes is None else nodes
    at_least(1, devices=devices, nodes=nodes)
    processes = _read_strategy(trainer.strategy, devices * nodes)
    if processes.context > 1:
        check_length(data.sequence_length, processes.context)
    if isinstance(data, CorpusDataModule):
        data.verify = False  # that would read everything
    rows = data.open("train") if cli.data_is_there else None
    sized = rows or cast(Rows, range(1))  # only the length is looked at
    parts = processes.total // processes.context
    loader = TrainLoader(sized, data.global_batch_size, data.micro_batch_size, 0, parts)
    check_accumulation(trainer.accumulate_grad_batches, loader.accumulation)
    cli.check()
    plan = (cli.model, data, cli.checkpoint, processes, trainer.max_steps, loader.accumulation)
    dtype, on_gpu = cli.model.network.compute_dtype, trainer.accelerator != "cpu"
    return PlannedRun(*plan, dtype, on_gpu, rows)


def _read_strategy(value: Any, total: int) -> Processes:
    """What ``trainer.strategy``, a name or a class with its arguments, makes of the processes."""
    name, settings = (value, {}) if isinstance(value, str) else (value.class_path, value.init_args)
    name = name.rpartition(".")[2]
    if name == "auto" and total == 1:
        return Processes("single", total)
    if name in ("auto", "DDPStrategy") or name.startswith("ddp"):
        return Processes("ddp", total)
    if name not in ("fsdp2", "FSDP2Strategy"):
        raise InputError(f"trainer.strategy is {name!r}; estimate knows auto, ddp and fsdp2")
    strategy = FSDP2Strategy(**settings)
    shards, context = strategy.shard_size or total, strategy.context_parallel_size
    check_sizes(total, shards, context)
    return Processes("fsdp2", total, shards, context, strategy.reshard_after_forward)


def estimate(plan: PlannedRun, mfu: float = 0.4, peak_tflops: float = PEAK) -> Estimate:
    """What a run needs where training reaches the share ``mfu`` of a device's ``peak_tflops``, in
    model FLOPs: recomputed ones do not count. An `InputError` names what is out of range.

    ``memory`` is bytes on one device, of whose ``loss`` and ``recomputed`` (a block's activations),
    which do not meet, ``total`` has the larger. While a checkpoint is written there is one more.
    ``epochs`` is None where the corpus is not there yet. See `REMARKS`.
    """
    if not 0 < mfu <= 1 or not 0 < peak_tflops < math.inf:
        raise InputError(f"mfu is {mfu} of {peak_tflops} TFLOP/s; allowed: 0 to 1 of more than 0")
    network, processes, T = plan.module.network, plan.processes, plan.data.sequence_length
    rows = plan.max_steps * plan.data.global_batch_size
    flops_per_row = training_flops(network, T, T * (T + 1) // 2)
    block, outside = _parameters(network)
    model = {
        "variant": type(network.position).__name__,
        "parameters": num_parameters(network),
        "parameters_per_block": block,
        "parameters_outside_blocks": outside,
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(network),
        "training_flops_per_token": flops_per_row / T,
    }
    run = {
        "strategy": processes.strategy,
        "devices": processes.total,
        "data_parallel": processes.total // processes.context,
        "micro_batches_per_step": plan.accumulation,
        "steps": plan.max_steps,
        "tokens_per_step": plan.data.global_batch_size * T,
        "tokens": rows * T,
        "training_flops": float(rows * flops_per_row),
        "mfu": mfu,
        "peak_tflops_per_device": peak_tflops,
        "hours": rows * flops_per_row / (mfu * peak_tflops * 1e12 * processes.total) / 3600,
    }
    epochs = None if plan.rows is None else rows / len(plan.rows)
    return {
        "model": model,
        "memory": _memory(plan),
        "run": run,
        "checkpoints": _checkpoints(plan),
        "data": {"rows": rows, "tokens": rows * T, "epochs": epochs},
    }


def _parameters(network: Transformer) -> tuple[int, int]:
    """In one block, and outside all blocks."""
    block = sum(parameter.numel() for parameter in network.blocks()[0].parameters())
    return block, num_parameters(network) - block * len(network.blocks())


def _optimizer_bytes(network: Transformer, spec: OptimizerSpec) -> int:
    """Float32: AdamW keeps two moments, Muon one for the matrices of the blocks."""
    matrices = sum(p.numel() for p in network.layers.parameters() if p.ndim == 2)
    return 8 * num_parameters(network) - (4 * matrices if isinstance(spec, Muon) else 0)


def _checkpoints(plan: PlannedRun) -> dict[str, int]:
    network, spec = plan.module.network, plan.module.optimizer_spec
    every, keep = plan.checkpoint.every_n_steps, plan.checkpoint.keep
    written = math.ceil(plan.max_steps / every) if every else 1  # the last step has one too
    kept = min(written, keep) if keep else written
    size = 4 * num_parameters(network) + _optimizer_bytes(network, spec)
    return {"written": written, "kept": kept, "bytes_each": size, "bytes_kept": size * kept}


def _memory(plan: PlannedRun) -> dict[str, int]:
    network, processes, size = plan.module.network, plan.processes, plan.dtype.itemsize
    parameters, shards = num_parameters(network), processes.shards
    tokens = plan.data.micro_batch_size * plan.data.sequence_length // processes.context
    in_block, elsewhere = trace_activations(plan)
    block_input = tokens * network.config.hidden_size * size
    recomputes = [block.recompute for block in network.blocks()]
    items = {
        "weights": 4 * parameters // shards,
        "gradients": 4 * parameters // shards,
        "gradient_buckets": 4 * parameters if processes.strategy == "ddp" else 0,
        "optimizer": _optimizer_bytes(network, plan.module.optimizer_spec) // shards,
        "gathered": _gathered(plan) if processes.strategy == "fsdp2" else 0,
        "activations": elsewhere + sum(block_input if r else in_block for r in recomputes),
    }
    # If the last block does not recompute, its activations go before those of others come back.
    loss, recomputed = _loss_bytes(plan, tokens), in_block if recomputes[-1] else 0
    total = sum(items.values()) + max(loss, recomputed)
    return {**items, "loss": loss, "recomputed": recomputed, "total": total}


def _gathered(plan: PlannedRun) -> int:
    """Two blocks, or all, and the output layer in the compute dtype; of the gradients, float32 on
    their way, a block's and an embedding's, or all where micro-batches add up first. Tied
    embeddings are whole for the step, in float32, with their gradient."""
    network, processes, size = plan.module.network, plan.processes, plan.dtype.itemsize
    block, outside = _parameters(network)
    tied, matrix = network.config.tied_embeddings, network.embed_tokens.weight.numel()
    blocks = (2 if processes.reshards else len(network.blocks())) * size * block
    gradients = num_parameters(network) if plan.accumulation > 1 else block + matrix
    return blocks + (4 * outside if tied else size * matrix) + 4 * gradients


def _loss_bytes(plan: PlannedRun, tokens: int) -> int:
    """Logits of a chunk; on a CPU some of them in float32 or their gradient's product with hidden
    states in bfloat16; the gradients of hidden states and output layer; the layer cast."""
    network = plan.module.network
    V, M, size = network.config.vocab_size, network.config.hidden_size, plan.dtype.itemsize
    gathered = plan.processes.strategy == "fsdp2" and not network.config.tied_embeddings
    low = size * V * M if size < 4 else 0
    cast_layer = 0 if gathered else low
    rows = chunk_rows(tokens, V, size, plan.on_gpu)
    extra = 0 if plan.on_gpu else max(4 * V * min(rows, cached_rows(V)), low)
    return size * rows * V + extra + size * tokens * M + 4 * V * M + cast_layer


def trace_activations(plan: PlannedRun) -> tuple[int, int]:
    """Bytes kept of a micro-batch for the backward pass, in one block and elsewhere but for the
    loss. Rows are one document; attention document by document keeps its output once more."""
    network, context = plan.module.network, plan.processes.context
    config, layout, dtype = network.config, network.layout, plan.dtype
    with FakeTensorMode():
        ids = torch.zeros(plan.data.micro_batch_size, plan.data.sequence_length // context).long()
        x = torch.zeros(*ids.shape, config.hidden_size, dtype=dtype, requires_grad=True)
        table = network.position.table(ids, config)
        block = Block(config, network.position, 0)
        if plan.processes.strategy == "fsdp2":  # parameters are gathered in the compute dtype
            for parameter in block.parameters():
                parameter.data = parameter.data.to(dtype)
        backend = network.blocks()[0].self_attn.backend
        fused = backend in BACKENDS and backend != "reference"  # these keep what sdpa keeps
        block.self_attn.backend = "sdpa" if fused else backend
        in_block = kept(lambda: block(x, table), block.parameters())
        shared = sum(in_block.pop(id(part.untyped_storage()), 0) for part in table)
        embed = nn.Embedding(config.vocab_size, config.hidden_size)
        norm = RMSNorm(config.hidden_size, config.norm_eps)
        at_ends = kept(lambda: norm(embed(ids).to(dtype)), [embed.weight, norm.weight])
    heads = 0
    if context > 1:  # all processes' keys and values, and the outputs of two pieces as one
        heads = 2 * (context - 1) * layout.num_kv_heads + layout.num_heads
    gathered = ids.numel() * heads * config.head_dim * dtype.itemsize
    return sum(in_block.values()) + gathered, shared + sum(at_ends.values())


def kept(function: Callable[[], Tensor], parameters: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages, by their ids, that ``function`` saves besides ``parameters``."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[id(storage)] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _held = function()  # with all that is saved, so that no id is used twice
    for parameter in parameters:
        sizes.pop(id(parameter.untyped_storage()), None)
    return sizes


def table(found: Estimate) -> str:
    """For people, without what is 0; GB are 10^9 bytes."""
    lines, formats = [], {int: ",", float: ",.4g", str: ""}
    for section, values in found.items():
        lines.append(section)
        for key, value in values.items():
            text = "unknown" if value is None else format(value, formats[type(value)])
            if section == "memory" or key in ("bytes_each", "bytes_kept"):
                text = f"{value / 1e9:,.3f} GB"
            label, remark = key.replace("_", " "), REMARKS.get(key, "")
            if value != 0:
                lines.append(f"  {label:<26}{text:>20}  {remark}".rstrip())
    return "\n".join(lines)
