"""``ropepp pipeline``."""

import shlex
from pathlib import Path

from ropepp import pipeline as pipelines
from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Runs the stages; ``args`` are those after ``ropepp pipeline``."""
    parser = Parser("ropepp pipeline", description=pipelines.__doc__)
    parser.add_argument("file", type=Path, help="the pipeline's YAML")
    parser.add_argument("--variants", help="only these, separated by commas")
    parser.add_argument("--dry", action="store_true", help="print the arguments of each fit")
    options = parser.parse_args(args)
    pipeline = pipelines.load(options.file)
    variants = list(pipeline.variants) if options.variants is None else options.variants.split(",")
    pipeline.check_variants("--variants", variants)
    if options.dry:
        for variant in variants:
            for stage in pipeline.stages_of(variant):
                then = f"  # after {stage.after}, of which it takes {stage.take}"
                arguments = shlex.join(pipeline.arguments(variant, stage))
                print(f"ropepp fit {arguments}{then if stage.after else ''}")
        return
    pipelines.run(pipeline, variants)
    path = pipelines.write_table(pipeline)
    print(f"{path.read_text()}\nwritten to {path}")
