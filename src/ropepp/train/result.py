"""``result.json``: what a finished run was and came to, for programs and tables."""

import time
from typing import Any

import lightning.pytorch as pl

from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters, training_flops
from ropepp.runs.machine import device_name, peak_memory_bytes, provenance
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.module import LanguageModel


def describe_run(
    trainer: pl.Trainer,
    module: LanguageModel,
    metrics: Metrics,
    evaluation: dict[str, float],
    sequence_length: int,
    seconds: float,
) -> dict[str, Any]:
    """The content of ``result.json``; sizes in bytes, losses in nats per token, times in
    seconds."""
    network, T = module.network, sequence_length
    return {
        "variant": type(network.position).__name__,
        "hyper_parameters": dict(module.hparams),
        "seed": module.seed,
        "steps": trainer.global_step,
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
