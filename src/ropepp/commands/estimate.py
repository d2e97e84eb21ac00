"""``ropepp estimate``."""

import json
import sys
from itertools import takewhile

from ropepp.options import Parser


def main(args: list[str]) -> None:
    """Prints what a run needs; ``args`` are those after ``ropepp estimate``."""
    from ropepp.train.estimate import PEAK, estimate, plan_run, table

    parser = Parser(
        "ropepp estimate",
        usage="%(prog)s CONFIG [CONFIG ...] [--KEY VALUE, as for fit] [options]",
        description="Memory, hours and disk of a training run. Needs neither GPU nor data.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", type=int, help="processes a node, instead of trainer.devices")
    add("--nodes", type=int, help="instead of trainer.num_nodes")
    add("--mfu", type=float, default=0.4, help="share of the peak that training reaches (0.4)")
    add("--peak_tflops", type=float, default=PEAK, help=f"of a device, dense bfloat16 ({PEAK})")
    add("--device_memory_gb", type=float, help="warn if the run needs more")
    add("--json", action="store_true", help="for programs; sizes in bytes")
    configs = list(takewhile(lambda arg: not arg.startswith("-"), args))
    own, rest = parser.parse_known_args(args[len(configs) :])
    plan = plan_run([*(f"--config={c}" for c in configs), *rest], own.devices, own.nodes)
    found = estimate(plan, own.mfu, own.peak_tflops)
    print(json.dumps(found, indent=2) if own.json else table(found))
    need = found["memory"]["total"] / 1e9
    if own.device_memory_gb is not None and not need <= own.device_memory_gb:
        print(f"warning: {need:.2f} GB exceed {own.device_memory_gb:g} GB", file=sys.stderr)
