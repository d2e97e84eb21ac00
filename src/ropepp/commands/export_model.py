"""``ropepp export``."""

from argparse import ArgumentParser
from pathlib import Path

from ropepp.files import require_free, require_writable


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
    add("--format", choices=("hf", "reference"), default="hf",
        help="hf: for transformers, an ordinary Llama where the model is one (default); "
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
    export(saved, options.folder, options.format, getattr(torch, options.dtype), options.tokenizer)
    print(f"written to {options.folder}")
