"""What a run leaves in its folder: its configuration at first, what it came to or predicted."""

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, Trainer

from ropepp.files import disk_errors, replacing_file, write_text
from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters, training_flops
from ropepp.runs.machine import device_name, peak_memory_bytes, provenance
from ropepp.runs.records import DIVERGED
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.module import LanguageModel


@dataclass(eq=False)
class RunFiles(Callback):
    """Writes ``config.yaml``, from which the run can be repeated, once all checks have passed. It
    goes on from ``ckpt_path``, and was asked to begin with ``begun_from``, if given."""

    directory: Path
    config: str
    ckpt_path: str | None
    begun_from: str | None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Not sooner: sharded checkpoints are restored, or refused, behind all that prepares a fit.
        if not trainer.is_global_zero:
            return
        network, root_device = pl_module.network, trainer.strategy.root_device
        print(
            f"{type(network.position).__name__}: {num_parameters(network):,} parameters, "
            f"{pl_module.hparams['compute_dtype']}, {trainer.world_size} x "
            f"{device_name(root_device)}, seed {pl_module.seed}, to {self.directory}",
            flush=True,
        )
        if network.sequence is not None:  # of what this sends, EH halves keys and values
            data, layout = trainer.datamodule, network.layout  # type: ignore[attr-defined]
            width = 2 if network.compute_dtype == torch.bfloat16 else 4
            sizes = data.micro_batch_size, data.sequence_length, layout.num_kv_heads
            size = network.sequence.bytes_gathered(*sizes, network.config.head_dim, width)
            print(
                f"rows shared by {network.sequence.size} processes: each receives "
                f"{size * network.config.num_layers:,} bytes of keys and values in a forward pass",
                flush=True,
            )
        content = yaml.safe_load(self.config)
        if self.ckpt_path:
            given = content["init_from"] or self.begun_from
            instead = f", not from {given}" if given not in (None, "last", self.ckpt_path) else ""
            print(f"going on from {self.ckpt_path}{instead}", flush=True)
        content.pop("config", None)  # the files that it was composed from
        # An interruption is no part of what the run is: its own checkpoints are not named.
        begun_from = Path(self.begun_from or "last")
        is_own = begun_from.name == "last" or self.directory in begun_from.parents
        content["ckpt_path"] = None if is_own else self.begun_from
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
        write_text(self.directory / "config.yaml", text)
        for logger in trainer.loggers:  # of the user's own; ours leaves it to config.yaml
            logger.log_hyperparams(content)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not (self.directory / "config.yaml").exists():  # no step was left
            self.on_train_start(trainer, pl_module)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that the parser, other than YAML 1.1, would read as a number: 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9_.]+([eE][-+]?[0-9]+)?$"), "-+.0123456789"
)


def describe_run(
    trainer: Trainer,
    module: LanguageModel,
    metrics: Metrics,
    evaluation: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """The content of ``result.json``; sizes in bytes, losses in nats per token, seconds."""
    network, T = module.network, trainer.datamodule.sequence_length  # type: ignore[attr-defined]
    found = infinite({**evaluation, "train/loss": metrics.latest.get("train/loss", 0.0)})
    content = {
        "variant": type(network.position).__name__,
        "hyper_parameters": dict(module.hparams),
        "seed": module.seed,
        "steps": trainer.global_step,
        "skipped_steps": module.guard.skipped if module.guard else 0,
        "tokens": metrics.tokens,
        "parameters": num_parameters(network),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(network),
        "training_flops_per_token": training_flops(network, T, T * (T + 1) // 2) / T,
        "sequence_length": T,
        "train_loss": metrics.latest.get("train/loss"),
        "validation_loss": evaluation["validation/loss"],
        "validation_perplexity": evaluation["validation/perplexity"],
        "evaluation": evaluation,
        "loss_by_position": module.loss_by_position,
        "tokens_per_second": metrics.tokens_per_second,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
        "device": device_name(trainer.strategy.root_device),
        "world_size": trainer.world_size,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **provenance(),
    }
    return strict(content | ({DIVERGED: found} if found else {}))


def infinite(numbers: dict[str, float]) -> str:
    """Which of these are not finite, in words; empty if all are."""
    return ", ".join(f"{key} is {x}" for key, x in numbers.items() if not math.isfinite(x))


def strict(value: Any) -> Any:
    """What JSON can hold: null for a number that is not finite."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


@dataclass(eq=False)
class PredictionWriter(Callback):
    """Writes a ``rank-R-batch-N.npz`` for each batch: input_ids, targets and nll, each (B, T)."""

    directory: Path

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        file = self.directory / f"rank-{trainer.global_rank}-batch-{batch_idx:06d}.npz"
        arrays = {key: value.cpu().numpy() for key, value in outputs.items()}
        with disk_errors(file), replacing_file(file) as stream:
            np.savez(stream, **arrays)
