"""The LightningModule: a transformer, its optimizer and schedule, and how the loss is averaged."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from ropepp.errors import InputError, at_least
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import check_shapes
from ropepp.model.plain import from_plain, to_plain, trusted
from ropepp.model.positions import Position
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import tokenizers
from ropepp.runs.machine import compile_reason, no_bfloat16
from ropepp.train.evaluation import Evaluation, model_inputs, on_the_way
from ropepp.train.guard import StepGuard
from ropepp.train.optim import AdamW, OptimizerSpec
from ropepp.train.schedules import Constant, Schedule
from ropepp.train.strategy import FSDP2Strategy
from ropepp.train.weights import check_optimizer, load_optimizer_from, load_weights

Batch = dict[str, Any]


class LanguageModel(pl.LightningModule):
    """Trains a causal language model with any position encoding.

    Args:
        network: Sizes of the model.
        position: The position encoding and with it the attention heads.
        optimizer: Optimizer with its peak learning rate.
        schedule: Course of the learning rate over ``trainer.max_steps``.
        compute_dtype: Dtype of activations and matrix products. Weights, optimizer state,
            rotations, norms' statistics, softmax and loss are float32 in any case.
        compile: Whether to compile each block with torch.compile.
        activation_checkpointing: Every n-th block (0: none) is computed again in backward passes.
        backend: Attention backend, see ``ropepp.model.kernels``.
        z_loss: Coefficient of the squared log of the softmax's normaliser in the objective
            (PaLM, arXiv 2204.02311); the logged loss is the cross entropy alone.
        seed: Seed of the initial weights.
    """

    def __init__(
        self,
        network: ModelConfig,
        position: Position,
        optimizer: OptimizerSpec = AdamW(),  # noqa: B008 (frozen)
        schedule: Schedule = Constant(),  # noqa: B008 (frozen)
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,  # noqa: A002
        activation_checkpointing: int = 0,
        backend: str = "auto",
        z_loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(0, "model.", activation_checkpointing=activation_checkpointing, z_loss=z_loss)
        # A checkpoint holds plain values, so that no class is unpickled; specs come back here.
        network = ModelConfig(**network) if isinstance(network, dict) else network
        position, optimizer, schedule = (from_plain(x) for x in (position, optimizer, schedule))
        for spec in (position, optimizer, schedule):
            if not trusted(module := type(spec).__module__):
                raise InputError(
                    f"{type(spec).__name__} is a class of {module}; a checkpoint that names it can "
                    f"be read only if you trust that module: ropepp --trust {module} ..."
                )
        plain = {
            "network": asdict(network),
            "position": to_plain(position),
            "optimizer": to_plain(optimizer),
            "schedule": to_plain(schedule),
            "compute_dtype": compute_dtype,
            "compile": compile,
            "activation_checkpointing": activation_checkpointing,
            "backend": backend,
            "z_loss": z_loss,
            "seed": seed,
        }
        self.save_hyperparameters(plain, logger=False)
        self.optimizer_spec = optimizer
        self.schedule = schedule
        self.compile_blocks = compile
        self.seed = seed
        # Memory is taken in configure_model, on the device that the strategy wants.
        dtype = getattr(torch, compute_dtype)
        with torch.device("meta"):
            self.network = Transformer(network, position, compute_dtype=dtype)
        self.network.set_backend(backend)
        self.network.set_recompute(activation_checkpointing)
        self.network.z_loss = z_loss
        self.init_from: str | None = None  # weights to begin with, instead of drawn ones
        self.init_optimizer = False  # whether the optimizer's moments come from there too
        self.fresh_optimizer = False  # whether a checkpoint's is left aside
        self.guard: StepGuard | None = None
        self.grad_norm: Tensor | None = None
        self.learning_rate = 0.0
        self.loss_by_position: dict[str, dict[str, list[float]]] = {}  # of the last evaluation
        self._evaluations: dict[str, Evaluation] = {}

    def configure_model(self) -> None:
        """Compiles, shards, materialises and initialises the network, once."""
        if not self.network.embed_tokens.weight.is_meta:
            return
        if self.compile_blocks:
            # Kinds of batches (rows, lengths, documents or none, training or not), all blocks
            # together; beyond so many the compiler would go on without compiling.
            torch._dynamo.config.recompile_limit = 64
            for block in self.network.blocks():
                block.compile(dynamic=False)
        strategy = None if self._trainer is None else self._trainer.strategy
        device = self.device if strategy is None else strategy.root_device
        if isinstance(strategy, FSDP2Strategy):
            strategy.shard(self.network)
        if self.compile_blocks and (reason := compile_reason(device)):
            raise InputError(f"model.compile is true, but nothing compiles here: {reason}")
        dtype = self.network.compute_dtype
        if dtype == torch.bfloat16 and (missing := no_bfloat16(device)):
            pl.utilities.rank_zero_warn(
                f"model.compute_dtype is bfloat16, but this {missing}; float32 may be tens of "
                "times faster here"
            )
        self.network.to_empty(device=device)
        self.network.initialize(self.seed)
        if self.init_from:
            load_weights(self.network, self.init_from)

    def setup(self, stage: str) -> None:
        """Checks what depends on the trainer and the data, before any work."""
        trainer = self.trainer
        if stage == "predict" and getattr(trainer.strategy, "context_parallel_size", 1) > 1:
            raise InputError("predict needs whole rows: trainer.strategy.context_parallel_size 1")
        data = getattr(trainer, "datamodule", None)
        data_vocab = getattr(data, "vocab_size", None)
        self.check(trainer.precision, data_vocab, trainer.max_steps if stage == "fit" else None)
        here = data.state_dict().get("tokenizer") if data is not None else None
        known = tokenizers(Path(self.init_from)) if self.init_from else ()
        if here and known and here not in known:
            raise InputError(
                f"init_from is {self.init_from}, trained with tokenizer {known[0][:12]}; that of "
                f"the data is {here[:12]}: prepare the text with the model's"
            )

    def check(self, precision: str, data_vocab: int | None, max_steps: int | None) -> None:
        """Raises an `InputError` if the trainer's precision, the data's token ids (None: unknown)
        or the number of optimizer steps (None: no training) do not suit this model."""
        if precision != "32-true":
            raise InputError(
                f"trainer.precision is {precision!r}; leave it at 32-true and choose "
                "model.compute_dtype, which means the same at every process count"
            )
        if max_steps is not None:
            if max_steps < 1:
                raise InputError(
                    f"trainer.max_steps is {max_steps}; give the number of optimizer steps"
                )
            self.schedule.check(max_steps)
        own = self.network.config.vocab_size
        if data_vocab is not None and data_vocab > own:
            raise InputError(
                f"model.network.vocab_size is {own}, but the data has token ids up to "
                f"{data_vocab - 1}: at least {data_vocab} is needed"
            )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finds the documents while their ids are on the host, where nothing is waited for."""
        return on_the_way(batch, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Its part of the mean loss over all targets of the optimizer step, whose number the batch
        says. Lightning divides by the number of micro-batches and the strategy averages over
        processes; both are taken back here."""
        total, _ = self.network.loss(*model_inputs(batch))
        num_micro_batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
        share = num_micro_batches / max(1, batch["num_targets"])
        return {"loss": total * share, "loss_sum": total.detach()}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm; keeps the norm before it and the step's learning rate for the log."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Of shards, each process has its share of the norm.
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.learning_rate = optimizer.param_groups[0]["lr"]
        self.grad_norm = norm
        if self.guard is not None and not self.guard.accepts(float(norm)):
            for parameter in parameters:
                parameter.grad = None  # optimizers leave such parameters and their state alone
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_spec.build(self.network)
        schedule = LambdaLR(optimizer, self._multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _multiplier(self, step: int) -> float:
        return self.schedule.multiplier(step, int(self.trainer.max_steps))

    def on_train_start(self) -> None:
        """Where the optimizer's state was restored, lets this run's settings win over its."""
        if self.init_from and self.init_optimizer:
            load_optimizer_from(self, self.trainer.optimizers[0], Path(self.init_from))
        elif not self.trainer.global_step:
            return
        elif self.fresh_optimizer:
            self.trainer.optimizers[0].state.clear()
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0]
        scheduler = schedule.scheduler
        assert isinstance(scheduler, LambdaLR)
        fresh = self.optimizer_spec.build(self.network).param_groups
        scheduler.base_lrs = [group["lr"] for group in fresh]
        for group, settings in zip(optimizer.param_groups, fresh, strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
            group["initial_lr"] = settings["lr"]
            group["lr"] = settings["lr"] * self._multiplier(scheduler.last_epoch)

    def on_validation_epoch_start(self) -> None:
        """A loss and an accuracy for each evaluation set; the data module may name several."""
        names = getattr(getattr(self.trainer, "datamodule", None), "evaluation_names", [""])
        self._evaluations = {name: Evaluation(self.device) for name in names}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        list(self._evaluations.values())[dataloader_idx].update(self.network, batch)

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "validation"
        self.loss_by_position = {}
        for name, evaluation in self._evaluations.items():
            named = {f"{stage}{name}/{key}": value for key, value in evaluation.compute().items()}
            # Equal on all processes already; Lightning warns unless it may average once more.
            self.log_dict(named, logger=False, sync_dist=True)
            self.loss_by_position[name] = evaluation.by_position()

    # A test is a validation under another name.
    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Negative log-likelihood in nats of every target, (B, T) float32; 0 without one."""
        nll, _ = self.network.evaluate(*model_inputs(batch))
        return {"input_ids": batch["input_ids"], "targets": batch["targets"], "nll": nll}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of another architecture; says which settings differ: this run's win."""
        saved, here = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
        # One that was saved may lack an argument that has come since.
        made = {"network": lambda plain: ModelConfig(**plain), "position": from_plain}
        for key in made:
            if key in saved and made[key](saved[key]) != made[key](here[key]):
                raise InputError(
                    f"the checkpoint's model.{key} is {saved[key]}, this run's is {here[key]}: "
                    "its weights belong to another model"
                )
        kinds = [one.get("optimizer", {}).get("class_path") for one in (saved, here)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise InputError(
                f"the checkpoint's optimizer is {kinds[0]}, this run's is {kinds[1]}: its state is "
                "of another kind; begin with the weights alone by --init_from"
            )
        where = (self._trainer and self._trainer.ckpt_path) or "checkpoint"
        if self._trainer and self._trainer.state.fn == "fit" and "callbacks" not in checkpoint:
            raise InputError(
                f"{where} has no callbacks, which count what was skipped and read: begin with its "
                "weights alone by --init_from"
            )
        if "state_dict" in checkpoint:  # otherwise the strategy has loaded it
            found = {k: tuple(x.shape) for k, x in checkpoint["state_dict"].items()}
            check_shapes(self.state_dict(), found, where)
            if self._trainer and self._trainer.state.fn == "fit":
                states = checkpoint.get("optimizer_states", [])
                if checkpoint["global_step"] and len(states) != 1:
                    raise InputError(f"{where} has {len(states)} optimizer's states, not one")
                for state in states:
                    check_optimizer(self, self.optimizer_spec.build(self.network), state, where)
        for key in sorted(saved.keys() & here.keys()):
            if saved[key] != here[key]:
                pl.utilities.rank_zero_warn(
                    f"model.{key} is {here[key]} here and was {saved[key]} in the checkpoint; "
                    "this run uses its own"
                )
