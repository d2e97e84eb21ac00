"""Stage of gpu_check: tokens per second behind caches, one kernel after another and as a CUDA
graph, and the share of what reading weights and cache once would allow."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from gpu_device import Bench, Case, Figure, drawn_on_device
from measure import SPECS
from ropepp.model import ModelConfig, Transformer
from ropepp.model.cache import KVCache


def decode(bench: Bench) -> list[Case]:
    """Of the 376M model."""
    scale, config = bench.scale, bench.scale.models["376m"]
    order = sorted(product(scale.batches, scale.caches), key=lambda x: x[0] * x[1])
    # The smallest, the largest, then what lies between.
    order = [order[0], order[-1], *order[1:-1]]
    return [
        Case(f"{name} {rows} x {length}", partial(time_decode, bench, config, name, rows, length))
        for rows, length in order
        for name in SPECS
    ]


def time_decode(
    bench: Bench, config: ModelConfig, variant: str, rows: int, length: int
) -> Iterator[Figure]:
    """Weights and cache in bfloat16; the cache holds random keys and values."""
    device = bench.device
    with torch.device("meta"):
        model = Transformer(config, SPECS[variant])
    model = model.bfloat16().to_empty(device=device.device).eval().requires_grad_(False)
    with drawn_on_device():
        model.initialize(0)
    # Of the embedding a token reads one line; a tied one is the output layer too.
    read = sum(p.nbytes for p in model.parameters())
    read -= 0 if config.tied_embeddings else model.embed_tokens.weight.nbytes
    K, D = model.layout.num_kv_heads, config.head_dim
    size = 2 * config.num_layers * rows * length * K * D * 2
    if 1.1 * size + 2**31 > device.free_bytes():
        yield "skipped", f"the cache takes {size / 1e9:.0f} GB", ""
        return
    cache = fill(model, rows, length)
    token = torch.randint(config.vocab_size, (rows, 1), device=device.device)

    @torch.inference_mode()
    def step() -> Any:
        logits = model(token, cache=cache)
        cache.crop(length)
        return logits

    yield "weights read", read / 1e9, "GB"
    yield "cache", cache.bytes / 1e9, "GB"
    limit = rows * device.bandwidth / (read + cache.bytes)
    yield "limit", limit, "tokens/s"
    yield from _figures("eager", rows, device.seconds(step, 15, 3), limit)
    try:
        replay = device.capture(step)
    except Exception as error:
        yield "no graph", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}", ""
        if not device.usable():
            raise
        return
    yield from _figures("graph", rows, device.seconds(replay, 15, 3), limit)


def _figures(name: str, rows: int, seconds: float, limit: float) -> Iterator[Figure]:
    yield f"{name} step", 1e3 * seconds, "ms"
    yield f"{name} rate", rows / seconds, "tokens/s"
    yield f"{name} share of limit", rows / seconds / limit, ""


def fill(model: Transformer, rows: int, length: int) -> KVCache:
    """A cache of random keys and values with room for one token more."""
    cache = KVCache(len(model.layers), length + 1)
    weight = model.embed_tokens.weight
    shape = (rows, length, model.layout.num_kv_heads, model.config.head_dim)
    for layer in cache.layers:
        k, v = (torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        layer.append(k, v)
    return cache
