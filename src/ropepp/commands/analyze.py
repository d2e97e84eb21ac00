"""``ropepp analyze``: looks into models and position encodings; imports what a command needs."""

from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ropepp.errors import optional
from ropepp.eval import PROTOCOLS
from ropepp.files import require_results
from ropepp.options import Parser, positive, seed

DESCRIPTION = """\
What do real and imaginary heads do? Each command prints a table and writes it with figures and
TensorBoard events into a folder; docs/analyze.md says how to read them.
"""
STDS = (0.2, 0.5, 1.0, 1.5)  # the ends are the paper's
Add = Callable[..., Any]  # a parser's add_argument


def main(args: list[str]) -> None:
    """Runs a command; ``args`` are those after ``ropepp analyze``."""
    parser = Parser("ropepp analyze", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    add = _with_model(commands, "noise", "noise on real or imaginary queries: which matter more?")
    _add_text(add)
    add("--metric", choices=("perplexity", "recall", "ruler"), default="perplexity",
        help="what is measured: of a text, of associative recall, of RULER's tasks")  # fmt: skip
    add("--stds", type=float, nargs="+", default=list(STDS), help="standard deviations")
    add("--draws", type=positive, default=5, help="noises for each standard deviation")
    add("--tasks", nargs="+", default=["niah_single_1"], help="RULER's tasks")
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="of RULER's tasks")
    add("--data", type=Path, metavar="DIR", help="as of evaluate, for RULER's tasks")
    _add_text(_with_model(commands, "attention", "where real and imaginary heads look"))
    add = _with_model(commands, "recall", "accuracy of associative recall over distance")
    add("--pairs", type=positive, nargs="+", help="pairs in a row; the trained number unless given")
    add("--lengths", type=positive, nargs="+",
        help="tokens in rows; 1, 2, 4 and 8 times the trained length unless given")  # fmt: skip
    add("--rows", type=positive, default=256, help="rows of each length and number of pairs")
    text = "how real and imaginary heads weigh distance, and what training shows them"
    add = _command(commands, "curves", text)
    add("--theta", type=float, nargs="+", default=[1e4, 5e5], help="bases of the frequencies")
    add("--scaling", nargs="*", default=["PI:8", "YaRN:32"], help="of the first base, NAME:FACTOR")
    add("--head_dim", type=positive, default=128, help="dimensions of a head")
    add("--trained_length", type=positive, default=4096, help="tokens that training has shown")
    add("--length", type=positive, default=32768, help="tokens in use")
    options = parser.parse_args(args)
    for module in ("matplotlib", "scipy"):  # which draw, and make intervals
        optional(module)
    analysis = import_module(f"ropepp.eval.analyze.{options.command}")
    name, models = options.command, []
    if "model" in options:
        from ropepp.interop.saved import open_model, placement

        device, dtype = placement(options.device, options.dtype)
        models = [open_model(options.model, dtype, device)]
        models[0].require_finite()
        name = models[0].name.replace("/", "-")
    options.out = options.out or Path("logs/analyze", name)
    require_results(options.out)
    analysis.analyze(*models, options)


def _command(commands: Any, name: str, text: str) -> Add:
    add: Add = commands.add_parser(
        name, help=text, description=text, formatter_class=ArgumentDefaultsHelpFormatter
    ).add_argument
    add("--out", type=Path, help="folder to write to; logs/analyze/NAME unless given")
    return add


def _with_model(commands: Any, name: str, text: str) -> Add:
    add = _command(commands, name, text)
    add("model", help="a run, a checkpoint, a folder with config.json, or hub:NAME[@REVISION]")
    add("--seed", type=seed, default=0, help="seed of all that is drawn")
    add("--device", help="cpu, cuda, ...; a GPU if there is one unless given")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    return add


def _add_text(add: Add) -> None:
    add("--text", type=Path, nargs="+", default=[],
        help="text files; the validation split of the model's own data unless given")  # fmt: skip
    add("--tokenizer", help="tokenizer of the texts; looked for beside the model unless given")
    add("--length", type=positive, help="tokens in a row; the trained length unless given")
    add("--rows", type=positive, default=64, help="most rows")
