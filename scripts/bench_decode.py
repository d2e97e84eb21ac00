"""Benchmarks of decoding: what a token costs behind a long cache, and reading the prompt.

Caches are filled with random keys and values, whose values do not change the time. Run by
scripts/bench.
"""

import itertools
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from measure import (
    CONFIG,
    DEVICE,
    DTYPES,
    FASTEST,
    SPECS,
    Step,
    alternate,
    forget_peak,
    in_processes,
    milliseconds,
    ratio,
)
from ropepp.generate.decode import read
from ropepp.model import ModelConfig, Transformer
from ropepp.model.cache import KVCache
from ropepp.runs.machine import peak_memory_bytes

# Blocks of the 376M model, fewer of them and with fewer words: the cache is what is looked at.
WIDE = ModelConfig(8192, 1024, 4, 8, 4, 3584)
LENGTHS, BATCHES = (2048, 8192, 32768, 65536), (1, 8)
DTYPE = DTYPES[FASTEST]
ROUNDS = 12


def model_of(name: str, config: ModelConfig = WIDE, dtype: torch.dtype = DTYPE) -> Transformer:
    return Transformer(config, SPECS[name]).to(DEVICE, dtype).eval().requires_grad_(False)


def filled(model: Transformer, rows: int, length: int) -> KVCache:
    cache = KVCache(len(model.layers), length + 1)
    K, D = model.layout.num_kv_heads, model.config.head_dim
    for layer in cache.layers:
        k, v = (torch.randn(rows, length, K, D, device=DEVICE).to(DTYPE) for _ in range(2))
        layer.append(k, v)
    return cache


def next_token(model: Transformer, cache: KVCache, token: Tensor) -> Step:
    """A step of the whole model behind a cache, which is as long afterwards as before."""
    length = cache.length

    @torch.inference_mode()
    def step() -> None:
        model(token, cache=cache)
        cache.crop(length)

    return step


def attend(model: Transformer, cache: KVCache, rows: int) -> Step:
    """The attention of a step alone, in all layers."""
    H, D = model.layout.num_heads, model.config.head_dim
    q = torch.randn(rows, 1, H, D, device=DEVICE).to(DTYPE)

    from ropepp.model.kernels import attention

    @torch.inference_mode()
    def step() -> None:
        for layer in cache.layers:
            attention(q, *layer.held)

    return step


def llama_token(rows: int, length: int) -> Step:
    """The same of transformers' Llama with its default cache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WIDE.vocab_size, hidden_size=WIDE.hidden_size,
        intermediate_size=WIDE.ffn_size, num_hidden_layers=WIDE.num_layers,
        num_attention_heads=WIDE.num_heads, num_key_value_heads=WIDE.num_kv_heads,
        max_position_embeddings=2 * length, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, DTYPE).eval()
    cache = DynamicCache(config=config)
    for layer in range(WIDE.num_layers):
        shape = (rows, WIDE.num_kv_heads, length, WIDE.head_dim)
        k, v = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(2))
        cache.update(k, v, layer)
    token = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)

    @torch.inference_mode()
    def step() -> None:
        with warnings.catch_warnings(action="ignore"):  # of the argument's older name
            model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)  # removes one

    return step


def bandwidth() -> float:
    """Bytes per second at which this machine reads memory, with all its threads."""
    x = torch.zeros(2**28, device=DEVICE)  # 1 GiB, far more than any cache of the processor
    times = alternate({"read": x.sum}, 7)["read"]
    return x.nbytes / statistics.median(times)


def bench_decode() -> list[str]:
    """A token behind a cache of keys and values: the attention of all layers, the whole model, and
    what reading weights and cache once at this machine's bandwidth would allow. Blocks of the
    376M model, 4 of them, vocabulary 8192; beside transformers' Llama with its own cache."""
    speed = bandwidth()
    lines = [f"{FASTEST}. Memory is read at {speed / 1e9:.1f} GB/s.", ""]
    header = ["batch, cached", "model", "cache", "attention", "over RoPE's", "tokens/s"]
    header += ["of limit", "speed over transformers'"]
    lines += [f"| {' | '.join(header)} |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for rows, length in itertools.product(BATCHES, LENGTHS):
        lines += decode_rows(rows, length, speed)
    return lines


def decode_rows(rows: int, length: int, speed: float) -> list[str]:
    token = torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
    models = {name: model_of(name) for name in SPECS}
    caches = {name: filled(model, rows, length) for name, model in models.items()}
    attention = alternate({n: attend(models[n], caches[n], rows) for n in SPECS}, ROUNDS)
    sides = {name: next_token(models[name], caches[name], token) for name in SPECS}
    if rows * length <= 65536:  # its cache is copied at every token
        sides["transformers"] = llama_token(rows, length)
    whole = alternate(sides, ROUNDS)
    lines = []
    for name, own in whole.items():
        rate = rows / statistics.median(own)
        cells = [f"{rows}, {length:,}", name]
        if name in SPECS:
            size = caches[name].bytes
            weights = sum(p.nbytes for p in models[name].parameters())
            limit = rows * speed / (weights + size)
            cells += [f"{size / 1e6:,.1f} MB", milliseconds_fine(attention[name])]
            cells += [ratio(attention[name], attention["RoPE"])]
            cells += [f"{rate:,.1f}", f"{rate / limit:.2f}"]
        else:
            cells += ["", "", "", f"{rate:,.1f}", ""]
        cells += [ratio(whole["transformers"], own) if "transformers" in whole else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def milliseconds_fine(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.2f} ms"


def prefill_memory(name: str, length: int) -> int:
    """Bytes that reading a prompt adds at its peak to the weights and the cache."""
    model = model_of(name, CONFIG, torch.float32)
    ids = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
    forget_peak()
    before = peak_memory_bytes(DEVICE)
    cache = KVCache(len(model.layers), length)
    with torch.inference_mode():
        read(model, ids, cache)
    return peak_memory_bytes(DEVICE) - before - cache.bytes


def bench_prefill() -> list[str]:
    """Reading a prompt in chunks of 2048 tokens into a cache, against a forward pass over the whole
    row without one, float32; and what it adds at its peak to weights and cache."""
    lines = ["| prompt | model | time | over one forward pass | memory | of one score matrix |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, length in itertools.product(SPECS, (8192, 32768)):
        model = model_of(name, CONFIG, torch.float32)
        ids = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
        sides: dict[str, Callable[[], object]] = {
            "chunks": lambda model=model, ids=ids: read(model, ids, KVCache(len(model.layers))),
            "whole": partial(model.hidden, ids),
        }
        with torch.inference_mode():
            times = alternate(sides, 5 if length < 10_000 else 2, warmup=1)
        memory = in_processes(1, prefill_memory, name, length)
        scores = 4 * model.layout.num_heads * length**2
        lines.append(
            f"| {length:,} | {name} | {milliseconds(times['chunks'])} | "
            f"{statistics.median(a / b for a, b in zip(*times.values(), strict=True)):.2f} | "
            f"{memory / 1e6:,.0f} MB | {memory / scores:.4f} |"
        )
    return lines


BENCHMARKS = {"decode": bench_decode, "prefill": bench_prefill}
