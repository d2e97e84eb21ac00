"""The process of gpu_check that measures: stages in their order, each until its time is up.

What it finds goes to standard output, one JSON object a line. Where the device no longer works
after an error, it ends with code 3, and gpu_check starts another that goes on behind that
measurement.
"""

import importlib
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

BROKEN = 3  # exit code of a process whose device is


class Stage(NamedTuple):
    """Where a stage's cases are made.

    Attributes:
        seconds: Its share of the time, of 290.
        module: File of the function.
        function: Its name.
        options: Arguments besides the bench.
    """

    seconds: float
    module: str
    function: str
    options: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default)

    def cases(self, bench: Any) -> list[Any]:
        """Imports no other stage's module: what is missing there does no harm here."""
        function = getattr(importlib.import_module(self.module), self.function)
        return function(bench, **self.options)


STAGES = {
    "ceilings": Stage(10, "gpu_kernels", "ceilings"),
    "parity": Stage(25, "gpu_kernels", "parity"),
    "speed": Stage(20, "gpu_kernels", "speed"),
    "376m": Stage(65, "gpu_training", "training", {"size": "376m"}),
    "decode": Stage(45, "gpu_decode", "decode"),
    "776m": Stage(70, "gpu_training", "training", {"size": "776m"}),
    "flex": Stage(55, "gpu_kernels", "flex"),
    "fit": Stage(60, "gpu_fit", "fit"),
}


def emit(**what: Any) -> None:
    OUT.write(json.dumps(what) + "\n")
    OUT.flush()


def run_stage(name: str, cases: list[Any], until: float, skip: int, bench: Any, on: str) -> None:
    """Runs cases while there is time for another as long as those before."""
    emit(event="stage", stage=name, until=until, cases=len(cases))
    took: list[float] = []
    for number, case in enumerate(cases[skip:], skip):
        left = until - time.time()
        if left < (0.7 * statistics.median(took) if took else 0):
            emit(event="cut", stage=name, done=number, cases=len(cases))
            return
        began = time.time()
        emit(event="case", stage=name, case=case.name, number=number)
        what = {"stage": name, "table": case.table, "case": case.name, "on": on}
        failed = False
        try:
            for figure, value, unit in case.run():
                emit(event="figure", **what, name=figure, value=value, unit=unit)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error).strip()}"[:600]
            emit(event="error", **what, name="error", value=said, unit="")
            failed = True
        if failed and not bench.device.usable():
            os._exit(BROKEN)
        bench.device.free(case.compiles or failed)
        took.append(time.time() - began)
    emit(event="end", stage=name)


def main(until: float, out: Path, rehearse: bool, wanted: list[str], skip: int) -> None:
    """Runs the wanted stages.

    Args:
        until: When the last must end, in seconds since 1970.
        out: Where files go.
        rehearse: Whether a CPU stands in for the GPU.
        wanted: Names of stages.
        skip: Cases of the first of them that are not run again.
    """
    import torch

    import gpu_device

    warnings.filterwarnings("ignore", module="lightning")
    bench = gpu_device.bench(rehearse, out)
    on = f"{bench.device.name}, torch {torch.__version__}"
    torch.manual_seed(0)
    weights = {name: stage.seconds for name, stage in STAGES.items()}
    for number, name in enumerate(wanted):
        now, rest = time.time(), wanted[number:]
        # A rehearsal is to reach everything: what takes longer there says nothing.
        share = 1.0 if rehearse else weights[name] / sum(weights[other] for other in rest)
        try:
            cases = STAGES[name].cases(bench)
            run_stage(name, cases, now + share * (until - now), 0 if number else skip, bench, on)
        except Exception as error:
            traceback.print_exc()
            emit(event="error", stage=name, table="", case="", on=on, name="error",
                 value=f"{type(error).__name__}: {error}"[:600], unit="")  # fmt: skip


if __name__ == "__main__":
    # What libraries print must not come between the lines.
    OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    main(given["until"], Path(given["out"]), given["rehearse"], given["stages"], given["skip"])
    OUT.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for what a compiler or a loader has left running
