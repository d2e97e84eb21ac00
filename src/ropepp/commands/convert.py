"""``ropepp convert``."""

from pathlib import Path

from ropepp.files import require_free, require_writable
from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Makes a checkpoint; ``args`` are those after ``ropepp convert``."""
    parser = Parser(
        "ropepp convert",
        description="Makes a checkpoint with more attention heads and the same function: from RoPE "
        "to EC, partial doubling or more phases. What is new begins as zero and can be trained.",
    )
    parser.add_argument("source", type=Path, help="a run, a checkpoint or a folder")
    parser.add_argument("file", type=Path, help="the new checkpoint, such as ec.ckpt")
    parser.add_argument("--position", type=Path, required=True, metavar="FILE",
        help="a YAML file such as configs/position/ec.yaml")  # fmt: skip
    options = parser.parse_args(args)
    require_free(options.file)
    require_writable(options.file)
    from ropepp.interop.convert import convert
    from ropepp.model.flops import num_parameters

    saved, network = convert(options.source, options.file, options.position)
    for model in (saved.model, network):
        heads = f"{model.layout.num_heads} attention heads of {model.layout.num_projections}"
        print(f"{model.position}: {heads} projections, {num_parameters(model):,} parameters")
    print(f"written to {options.file}: for --init_from")
