"""``ropepp evaluate``: models and benchmarks in, one table out; see docs/evaluate.md."""

from pathlib import Path

from ropepp.eval import PROTOCOLS, SUITES
from ropepp.options import Parser, positive, seed


def main(args: list[str]) -> None:
    """Runs the command; ``args`` are those after ``ropepp evaluate``."""
    parser = Parser(
        "ropepp evaluate",
        description="Perplexity, short benchmarks, RULER and BABILong of any number of models, in "
        "one table. The same command goes on after an interruption. docs/evaluate.md describes "
        "the data.",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="a run, a checkpoint, a folder with config.json, hub:NAME[@REVISION]")  # fmt: skip
    add("--suite", nargs="+", choices=(*SUITES, "all"), default=["all"], help="(all)")
    add("--tasks", nargs="+", metavar="NAME", help="only these texts and tasks of the suites")
    add("--data", type=Path, metavar="DIR", help="folder of the benchmarks' files")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE",
        help="more texts for perplexity: any text file, or .jsonl lines with 'text'")  # fmt: skip
    add("--lengths", nargs="+", type=positive, default=[4096], metavar="N",
        help="tokens of a window of a text, and of a generated sample (4096)")  # fmt: skip
    add("--stride", type=positive, help="tokens between windows (an eighth of the window)")
    add("--samples", type=positive, metavar="N",
        help="samples of a generated task (100), questions of a short one (all)")  # fmt: skip
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0],
        help="of ruler and babilong: the benchmarks' own (official), or the paper's")  # fmt: skip
    add("--seed", type=seed, default=0, help="of the generated samples (0)")
    add("--tokenizer", help="file, folder or 'bytes'; the model's own unless given")
    add("--device", help="cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on cuda, else float32")
    add("--batch_tokens", type=positive, metavar="N",
        help="most tokens of a batch (65536 on cuda, else 8192)")  # fmt: skip
    add("--out", type=Path, default=Path("logs/evaluate"), metavar="DIR",
        help="where tables and finished items are kept (logs/evaluate)")  # fmt: skip
    options = parser.parse_args(args)
    from ropepp.eval.evaluate import run

    run(options)
