"""``ropepp import``."""

from pathlib import Path

from ropepp.files import require_free, require_writable
from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Makes a checkpoint; ``args`` are those after ``ropepp import``."""
    parser = Parser(
        "ropepp import",
        description="Makes a checkpoint of a folder with config.json and safetensors: a published "
        "RoPE++ model, a plain Llama, or an export. Prints what a run that takes it must say.",
    )
    parser.add_argument("folder", help="or hub:NAME[@REVISION]")
    parser.add_argument("file", type=Path, help="the new checkpoint, such as model.ckpt")
    options = parser.parse_args(args)
    require_free(options.file)
    require_writable(options.file)
    import yaml  # type: ignore[import-untyped]

    from ropepp.interop.saved import import_checkpoint

    found = import_checkpoint(options.folder, options.file)
    print(yaml.safe_dump({"model": found}, sort_keys=False), end="")
    print(f"# written to {options.file}: for --init_from, and for --ckpt_path of validate and test")
