"""One side of `scripts/bench peers`: training steps of one model, when it is told to.

A process of its own, so that a peer can live in its own environment and has its own peak of memory.
Reads lines from standard input: a number of steps to make, answered by a line of JSON with their
seconds; at the end of the input it goes. All sides have the same sizes, rows of random tokens,
AdamW (fused), clipping at norm 1 and float32 weights; bfloat16 is mixed precision as the side's own
training has it (autocast for the peers).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # sides that wait must not spin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], object]


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision as the peers have it."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", dtype=dtype)


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A whole optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(
    sizes: dict[str, int], ids: Tensor, dtype: torch.dtype, compiled: bool
) -> Step:
    """transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    run = torch.compile(model, dynamic=False) if compiled else model
    inputs = ids[:, :-1].contiguous()

    def loss() -> Tensor:
        with autocast(dtype):
            found = run(input_ids=inputs, labels=inputs).loss
        assert isinstance(found, Tensor)
        return found

    return step_of(model, loss)


def litgpt_step(sizes: dict[str, int], ids: Tensor, dtype: torch.dtype, compiled: bool) -> Step:
    """litgpt's GPT with its chunked loss, as its pre-training runs it."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=ids.shape[1] - 1,
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        n_query_groups=sizes["num_kv_heads"],
        n_embd=sizes["hidden_size"],
        intermediate_size=sizes["ffn_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    run = torch.compile(model, dynamic=False) if compiled else model
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss() -> Tensor:
        with autocast(dtype):
            found = chunked_cross_entropy(run(inputs), targets)
        assert isinstance(found, Tensor)
        return found

    return step_of(model, loss)


def own_step(
    position: str, sizes: dict[str, int], ids: Tensor, dtype: torch.dtype, compiled: bool
) -> Step:
    """Ours, through the LightningModule's own preparation."""
    from ropepp.model import ModelConfig
    from ropepp.model.positions import RoPE, RoPEppEC, RoPEppEH
    from ropepp.train.module import LanguageModel

    specs = {"RoPE": RoPE(), "EC": RoPEppEC(), "EH": RoPEppEH()}
    name = "float32" if dtype == torch.float32 else "bfloat16"
    module = LanguageModel(
        ModelConfig(**sizes), specs[position], compute_dtype=name, compile=compiled
    )
    module.configure_model()
    model = module.network
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss() -> Tensor:
        total, count = model.loss(inputs, targets)
        return total / count

    return step_of(model, loss)


def bare_step(sizes: dict[str, int], ids: Tensor, dtype: torch.dtype, compiled: bool) -> Step:
    """RoPE's matrix products and attention alone, forward and both gradients: what no training
    step can be faster than with these kernels."""
    M, ffn, V = sizes["hidden_size"], sizes["ffn_size"], sizes["vocab_size"]
    H, K, D = sizes["num_heads"], sizes["num_kv_heads"], M // sizes["num_heads"]
    B, T = ids.shape[0], ids.shape[1] - 1
    shapes = [(M, H * D), (M, K * D), (M, K * D), (H * D, M), (M, ffn), (M, ffn), (ffn, M)]
    once = [(torch.randn(B * T, i), torch.randn(o, i), torch.randn(B * T, o)) for i, o in shapes]
    last = (torch.randn(B * T, M), torch.randn(V, M), torch.randn(B * T, V))
    q = torch.randn(B, H, T, D, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, K, T, D, dtype=dtype, requires_grad=True) for _ in range(2))
    products = [tuple(x.to(dtype) for x in one) for one in once * sizes["num_layers"] + [last]]

    def step() -> None:
        for x, w, grad in products:
            torch.mm(x, w.t())
            torch.mm(grad, w)
            torch.mm(grad.t(), x)
        for _ in range(sizes["num_layers"]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out.backward(out.detach())

    return step


SIDES = {"transformers": transformers_step, "litgpt": litgpt_step, "bare": bare_step}


def peak_bytes() -> int:
    """The most memory that this process had."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True)
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    # Answers alone go there: packages print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    torch.manual_seed(0)
    shape = (options.rows, options.length + 1)
    ids = torch.randint(options.sizes["vocab_size"], shape)
    arguments = (options.sizes, ids, getattr(torch, options.dtype), options.compiled)
    make = SIDES.get(options.side)
    step = make(*arguments) if make else own_step(options.side, *arguments)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(json.dumps({"seconds": times, "peak": peak_bytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
