"""``ropepp export``."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepp.files import require_free, require_writable

if TYPE_CHECKING:
    from ropepp.model.transformer import Transformer


def main(args: list[str]) -> None:
    """Makes a folder; ``args`` are those after ``ropepp export``.

    Raises:
        InputError: See `ropepp.interop.export.export`.
    """
    parser = ArgumentParser(
        "ropepp export",
        description="Makes a folder of a model, for transformers or in the published format.",
    )
    add = parser.add_argument
    add("source", type=Path, help="a run, a checkpoint, a published or exported folder")
    add("folder", type=Path, help="the new folder")
    add("--format", choices=("hf", "llama", "ropepp", "reference"), default="hf",
        help="llama: an ordinary Llama, for programs that know no RoPE++; ropepp: for transformers "
        "with this package; hf: the first of these that the model can be (default); "
        "reference: the published RoPE++ format")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--tokenizer", help="file, folder or 'bytes'; otherwise the model's own")
    options = parser.parse_args(args)
    require_free(options.folder)
    require_writable(options.folder, folder=True)
    import torch

    from ropepp.interop.export import export
    from ropepp.interop.saved import open_model

    saved = open_model(options.source)
    dtype = getattr(torch, options.dtype)
    settings = export(saved, options.folder, options.format, dtype, options.tokenizer)
    print(grown(saved.model, settings))
    print(f"written to {options.folder}")


def grown(model: "Transformer", settings: dict[str, Any]) -> str:
    """Parameters and KV cache of an export with this ``config.json``, and of the model before."""
    from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters

    config, layout = model.config, model.layout
    before = after = num_parameters(model)
    name = settings["architectures"][0]
    if name != "RoPEppForCausalLM" and "rope_config" not in settings:
        heads = settings["num_attention_heads"] - layout.num_projections
        after += heads * config.num_layers * config.hidden_size * config.head_dim
    cache = kv_cache_bytes_per_token(model)
    line = f"{name}: {after:,} parameters"
    if after != before:
        line += (
            f" ({before:,} before: each of {layout.num_heads} attention heads now has a query "
            f"matrix, which {layout.num_projections} had)"
        )
    return f"{line}, KV cache {cache:,} bytes a token in bfloat16 as before"
