"""``ropepp export``."""

from pathlib import Path

from ropepp.files import require_free, require_writable
from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Makes a folder; ``args`` are those after ``ropepp export``."""
    parser = Parser(
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
    from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters
    from ropepp.model.folders.published import OWN_TYPE

    saved = open_model(options.source)
    dtype = getattr(torch, options.dtype)
    settings = export(saved, options.folder, options.format, dtype, options.tokenizer)
    config, layout, before = saved.model.config, saved.model.layout, num_parameters(saved.model)
    name, added = settings["architectures"][0], 0
    if OWN_TYPE in settings:  # a Llama: each attention head has a query matrix
        added = layout.num_heads - layout.num_projections
    after = before + added * config.num_layers * config.hidden_size * config.head_dim
    print(
        f"{name}: {after:,} parameters ({before:,} before: query matrices of "
        f"{layout.num_projections + added} heads, {layout.num_projections} before), "
        f"KV cache {kv_cache_bytes_per_token(saved.model):,} bytes a token as before"
    )
    print(f"written to {options.folder}")
