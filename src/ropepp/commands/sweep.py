"""``ropepp sweep``: sets up, runs, watches and reports sweeps; imports what a command needs."""

import os
import sys
from argparse import Namespace
from pathlib import Path

from ropepp.errors import InputError, optional
from ropepp.options import Parser, positive
from ropepp.runs.survival import lasting_output

DESCRIPTION = """\
Variants and seeds from one YAML: run all, survive anything, report.
Examples are in configs/sweep, how to use them in docs/sweeps.md.
"""


def main(args: list[str]) -> None:
    """Runs a command; ``args`` are those after ``ropepp sweep``. Raises what the commands raise,
    and a SystemExit with code 1 if runs have failed."""
    parser = Parser("ropepp sweep", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("init", help="check everything and list what is to be run")
    one.add_argument("file", type=Path, help="a sweep's YAML")
    one = commands.add_parser("run", help="run what is left; any number of these may work together")
    one.add_argument("file", type=Path, help="a sweep's YAML")
    add = one.add_argument
    add("--jobs", type=positive, help="runs at a time; 1, or one a GPU, unless given")
    add("--gpus", help="devices to hand out one by one, such as 0,1,2, or auto")
    add("--retry-failed", action="store_true", help="try again what has failed before")
    add("--limit", type=positive, help="most runs to start")
    add("--grace", type=float, default=300.0, metavar="SECONDS",
        help="how long runs may take to end before they are killed (300)")  # fmt: skip
    one = commands.add_parser("status", help="a table of all runs")
    one.add_argument("path", type=Path, help="a sweep's YAML or folder")
    one.add_argument("--watch", action="store_true", help="again and again until all have ended")
    one = commands.add_parser("report", help="write the report and what TensorBoard shows")
    one.add_argument("path", type=Path, help="a sweep's YAML or folder")
    options = parser.parse_args(args)
    if options.command == "report":
        _write_report(_folder(options.path))
    else:
        {"init": _init, "run": _run, "status": _status}[options.command](options)


def _init(options: Namespace) -> None:
    from ropepp.sweep.config import load
    from ropepp.sweep.study import open_sweep

    config = load(options.file)
    runs = sum(len(trial.runs) for trial in open_sweep(config).trials())
    drawn = f", and {config.trials} points to draw for each row" if config.search else ""
    print(f"{config.folder}: {len(config.rows)} rows, {runs} runs{drawn}; all accepted by fit")


def _run(options: Namespace) -> None:
    from ropepp.sweep.config import load
    from ropepp.sweep.runner import Driver
    from ropepp.sweep.study import open_sweep

    config = load(options.file)
    gpus = slots(options.jobs, options.gpus)
    config.require_launcher()
    for module in ("matplotlib", "scipy"):  # of the report at the end
        optional(module)
    driver = Driver(open_sweep(config), gpus, options.retry_failed, options.limit, options.grace)
    if driver.threads:
        print(f"{len(gpus)} at a time, each with {driver.threads} threads (OMP_NUM_THREADS)")
    with lasting_output():
        driver.run()
    states = list(driver.finished.values())
    if not driver.is_complete:
        print(f"{config.folder}: not complete; the same command goes on")
    elif "complete" in states:
        _write_report(config.folder)
    if "failed" in states:
        print(f"{states.count('failed')} failed; see `ropepp sweep status {config.folder}`")
        sys.exit(1)


def slots(jobs: int | None, gpus: str | None) -> list[str | None]:
    """The device of each of the runs at a time, None for any; an `InputError` if there is none."""
    if gpus is None:
        return [None] * (jobs or 1)
    devices = visible_gpus() if gpus == "auto" else gpus.split(",")
    if not devices or not all(device.strip() for device in devices):
        raise InputError(f"--gpus is {gpus}; allowed: devices such as 0,1,2, or auto with some")
    return [devices[number % len(devices)].strip() for number in range(jobs or len(devices))]


def visible_gpus() -> list[str]:
    """GPUs that this process may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [device for device in allowed.split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _status(options: Namespace) -> None:
    from ropepp.runs.status import show

    try:
        show(_folder(options.path), options.watch)
    except KeyboardInterrupt:
        sys.exit(130)


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path
    from ropepp.sweep.config import load

    return load(path).folder


def _write_report(folder: Path) -> None:
    from ropepp.runs.records import read_plan
    from ropepp.sweep.boards import write_boards
    from ropepp.sweep.report import write_report
    from ropepp.sweep.study import exclusive

    read_plan(folder)  # before anything is made in it
    with exclusive(folder):
        for file in write_report(folder):
            print(file)
        print(write_boards(folder))
