"""Sharded training (FSDP2), one class for CPU and GPU, one process or many."""

import atexit
import os
import random
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward

from ropepp.errors import InputError, at_least
from ropepp.files import DiskError, disk_errors, remove
from ropepp.model.sequence import SequenceGroup
from ropepp.model.transformer import Transformer
from ropepp.runs.archives import write_archive
from ropepp.runs.checkpoints import METADATA, read_checkpoint
from ropepp.runs.shards import one_failure, seal
from ropepp.train.checkpoint_files import CheckpointFiles
from ropepp.train.weights import load_optimizer, load_optimizer_shards, load_whole


class OneMachine(LightningEnvironment):
    """Processes that `fit` starts itself; they meet at a port that nobody is lent meanwhile. What
    the system lends, above these, Lightning returns and uses seconds later, when another program's
    connection may end there."""

    @property
    def main_port(self) -> int:
        """``MASTER_PORT`` where it is set, else a free one between 20000 and 32767."""
        if self._main_port == -1 and not {"MASTER_PORT", "STANDALONE_PORT"} & set(os.environ):
            ports = random.SystemRandom().sample(range(20_000, 32_768), 1_000)
            self._main_port = next(filter(_is_free, ports), -1)
        return super().main_port


def _is_free(port: int) -> bool:
    with socket.socket() as listener, suppress(OSError):
        listener.bind(("", port))
        return True
    return False


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer state over processes.

    Results do not depend on the number of processes beyond rounding: weights are drawn whole and
    then cut, and each step's loss is the mean over the targets of all processes.

    Blocks and output layer compute with parameters gathered in the model's compute dtype; embedding
    and final norm, and an output layer that is the embedding, are gathered in float32, because
    their gradients sum over many tokens; the output layer's is float32 for the same reason.
    Gradients are reduced in float32. A Trainer that evaluates needs ``inference_mode=False``,
    as the command line gives it: over NCCL, what was gathered in inference mode cannot train later.

    Args:
        shard_size: Processes that share one copy of the model; all of them unless given. With a
            node's GPUs, nodes hold whole copies and exchange gradients alone (hybrid sharding).
        context_parallel_size: Processes that share each row of tokens (contexts of 64k and more).
        reshard_after_forward: Whether blocks are gathered again for the backward pass: less memory.
        asynchronous_save: Whether training goes on while a copy in host memory is written.
        timeout_minutes: How long a process waits for the others before it gives up.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        shard_size: int | None = None,
        context_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        asynchronous_save: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        at_least(1, "trainer.strategy.", shard_size=shard_size)
        at_least(1, "trainer.strategy.", context_parallel_size=context_parallel_size)
        self.shard_size = shard_size
        self.context_parallel_size = context_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.asynchronous_save = asynchronous_save
        self.pending_save: Future[Any] | None = None
        self._sequence: SequenceGroup | None = None
        self._save_group: dist.ProcessGroup | None = None
        self._saving: Path | None = None

    @property
    def data_rank(self) -> int:
        """Which part of a batch this process reads; those that share rows read the same."""
        return self.global_rank // self.context_parallel_size

    @property
    def data_size(self) -> int:
        """In how many parts a batch is cut."""
        return self.world_size // self.context_parallel_size

    def set_world_ranks(self) -> None:
        if type(self.cluster_environment) is LightningEnvironment:
            self.cluster_environment = OneMachine()
        super().set_world_ranks()

    def setup_environment(self) -> None:
        self._setup_distributed()
        # Lightning does this for nccl alone; without it processes may abort on their way out.
        atexit.register(_leave)
        world = self.world_size
        shard = self.shard_size or world
        check_sizes(world, shard, self.context_parallel_size)
        device = self.root_device.type
        shape = (world,) if shard == world else (world // shard, shard)
        names = ("replicate", "shard")[-len(shape) :]
        self._device_mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        if self.context_parallel_size > 1:
            # Neighbours share rows: they are on one node, where links are fastest.
            sizes = (self.data_size, self.context_parallel_size)
            mesh = init_device_mesh(device, sizes, mesh_dim_names=("data", "context"))
            self._sequence = SequenceGroup(mesh.get_group("context"))
        if self.asynchronous_save:
            # A group of its own: the writing thread's exchanges must not meet those of training.
            self._save_group = dist.new_group(backend="gloo")

    def shard(self, network: Transformer) -> None:
        """Shards ``network`` in place, and lets it share rows if asked; for `configure_model`."""
        shard(network, self.device_mesh, self.reshard_after_forward)
        network.sequence = self._sequence

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Of a micro-batch that is not an optimizer step's last: lets its gradients add up whole in
        this process, 4 bytes a parameter, for one exchange a step."""
        assert self.lightning_module is not None
        network = cast(FSDPModule, self.lightning_module.network)
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a directory: each process its shards, the first one everything else and, when all
        shards are there, ``.metadata``; with ``asynchronous_save`` while training goes on."""
        self.wait_for_save()
        path = Path(self.broadcast(filepath))
        state = {"state_dict": checkpoint.pop("state_dict")}
        for index, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer
        failure = None
        if self.is_global_zero:
            try:
                with disk_errors(path):
                    remove(path)  # what a killed save left
                    path.mkdir(parents=True)
                write_archive(checkpoint, path / METADATA)
            except DiskError as error:
                failure = str(error)
        if (failure := self.broadcast(failure)) is not None:  # nobody waits for the others
            raise DiskError(failure)
        with disk_errors(path), one_failure(path):
            if self.asynchronous_save:
                # A response with a future of its own is what other checkpointer types return.
                saved = dcp.async_save(state, checkpoint_id=path, process_group=self._save_group)
                self.pending_save = saved if isinstance(saved, Future) else saved.upload_completion
            else:
                dcp.save(state, checkpoint_id=path)
        self._saving = path

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restores model and optimizer from shards or from one file; returns everything else."""
        path, files = Path(self.broadcast(checkpoint_path)), self.checkpoint_io
        if isinstance(files, CheckpointFiles):
            return files.load(path, self._load)
        return self._load(path)  # a trainer that the command line has not made

    def _load(self, path: Path) -> dict[str, Any]:
        # Lightning's own would unpickle the index, and number the optimizer's parameters of a
        # single file in the model's order, not in that of the optimizer's groups.
        module = self.model
        assert module is not None
        used = ("state_dict", "optimizer_states") if self.optimizers else ("state_dict",)
        content = read_checkpoint(path, *used)
        own = {k.removeprefix("network."): x for k, x in module.state_dict().items()}
        load_whole(own, path, content)
        content.pop("state_dict", None)
        states = content.pop("optimizer_states", [])
        for optimizer in self.optimizers[:1]:  # there is one at most
            if path.is_dir():
                load_optimizer_shards(module, optimizer, path)
            elif states:
                load_optimizer(module, optimizer, states[0], path)
        return content

    def wait_for_save(self) -> None:
        """Returns when all that was written is on the disk; raises what went wrong with it."""
        pending, self.pending_save = self.pending_save, None
        path, self._saving = self._saving, None
        if path is None:
            return
        if pending is not None:
            with disk_errors(path), one_failure(path):
                pending.result()
        if self.is_global_zero:
            seal(path)

    def teardown(self) -> None:
        self.wait_for_save()
        super().teardown()


def check_sizes(world: int, shard_size: int, context_parallel_size: int) -> None:
    """Raises an `InputError` if ``world`` processes cannot be grouped like this."""
    sizes = {"shard_size": shard_size, "context_parallel_size": context_parallel_size}
    for name, size in sizes.items():
        if world % size:
            raise InputError(
                f"trainer.strategy.{name} is {size}; it must divide the number of processes, "
                f"{world}"
            )


def shard(network: Transformer, mesh: DeviceMesh, reshard_after_forward: bool = True) -> None:
    """Shards each block and the rest of ``network`` in place, also on the meta device, over a mesh
    of one dimension, or (copies, shards of a copy), as `FSDP2Strategy` says."""
    # cos and sin, given to the blocks, stay float32.
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = replace(wide, param_dtype=network.compute_dtype)
    for block in network.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    head, embedding = network.lm_head, network.embed_tokens
    if not network.config.tied_embeddings:  # what is shared cannot be in two groups
        # The output layer's backward pass follows at once; the embedding's needs no weights.
        fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        head.gradient_dtype = torch.float32
        fully_shard(embedding, mesh=mesh, mp_policy=wide, reshard_after_forward=True)
        cast(FSDPModule, embedding).set_unshard_in_backward(False)
    fully_shard(network, mesh=mesh, mp_policy=wide)
    for module in (network, head):
        for method in ("loss", "evaluate"):
            register_forward(module, method)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


StrategyRegistry.register("fsdp2", FSDP2Strategy, "Weights, gradients, optimizer state sharded")
