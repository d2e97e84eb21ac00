"""Stage of gpu_check: the command line of training under FSDP2 with one process."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from gpu_device import Bench, Case, Figure

NEEDED = ("jsonargparse", "omegaconf", "typeshed_client", "docstring_parser", "tensorboard", "tqdm")
NETWORK = {"vocab_size": 257, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}  # fmt: skip # noqa: E501


def fit(bench: Bench) -> list[Case]:
    """Trains, goes on, evaluates, is asked to end."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return [Case("fit", partial(_skipped, missing))]
    logs = Path(mkdtemp(prefix="gpu_check-"))  # many files, none of which is a result
    return [
        Case("prepare", partial(prepare, logs)),
        Case("train 6 steps", partial(run, bench, logs, "fit", 0, "--trainer.max_steps=6")),
        Case(
            "go on to 12",
            partial(run, bench, logs, "fit", 0, "--trainer.max_steps=12", "--resume=auto"),
        ),
        Case("validate", partial(run, bench, logs, "validate", 0, "--ckpt_path=last")),
        Case("SIGUSR1", partial(stop, bench, logs)),
    ]


def _skipped(missing: list[str]) -> Iterator[Figure]:
    yield "skipped", f"{', '.join(missing)} missing", ""


def prepare(logs: Path) -> Iterator[Figure]:
    """Token files of bytes, of text written on the spot."""
    from ropepp.data.prepare.prepare import prepare as make

    text = logs / "text"
    text.mkdir()
    for number in range(30):
        words = [f"word{(number * 31 + i * i) % 97}" for i in range(20 + 7 * number)]
        (text / f"{number:03d}.txt").write_text(" ".join(words) + ".\n")
    make(str(text), str(logs / "corpus"), tokenizer="bytes", validation_fraction=0.1)
    yield "files", float(len(list((logs / "corpus").rglob("*.bin")))), ""


def run(bench: Bench, logs: Path, command: str, code: int, *flags: str) -> Iterator[Figure]:
    """A command in this process; checks its exit code."""
    from ropepp.cli import main

    values: dict[str, object] = {f"model.network.{key}": value for key, value in NETWORK.items()}
    values |= {
        "model.position": "RoPEppEC", "model.compute_dtype": "bfloat16",
        "data": "CorpusDataModule", "data.corpus": logs / "corpus", "data.sequence_length": 64,
        "data.global_batch_size": 8, "data.micro_batch_size": 4,
        "data.validate_every_n_steps": 6, "trainer.devices": 1,
        "trainer.accelerator": "cpu" if bench.rehearses else "gpu",
        "trainer.strategy": "fsdp2", "trainer.gradient_clip_val": 1.0,
        "checkpoint.every_n_steps": 3, "logs": logs, "run": "check",
        "metrics.every_n_steps": 1,
    }  # fmt: skip
    args = [command, *(f"--{key}={value}" for key, value in values.items()), *flags, "--debug"]
    began = time.perf_counter()
    found = main(args)
    yield "seconds", time.perf_counter() - began, "s"
    yield "exit code", float(found), ""
    yield "newest checkpoint", newest(logs), ""
    if found != code:
        raise AssertionError(f"exit code {found} instead of {code}")


def newest(logs: Path) -> str:
    return max((path.name for path in logs.rglob("step-*.ckpt")), default="none")


def stop(bench: Bench, logs: Path) -> Iterator[Figure]:
    """A long run is asked to end when it has made a step more; it must save and say so."""
    before, done = newest(logs), threading.Event()
    metrics = next(logs.rglob("metrics.jsonl"))
    size = metrics.stat().st_size
    # If it comes too late. A run does not listen to what is ignored when it begins.
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)

    def ask() -> None:
        while not done.wait(0.05):
            if metrics.stat().st_size > size:
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        flags = ("--trainer.max_steps=100000", "--resume=auto", "--checkpoint.every_n_steps=0")
        yield from run(bench, logs, "fit", 75, *flags)
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGUSR1, handler)
    after = newest(logs)
    shutil.rmtree(logs, ignore_errors=True)
    if after == before:
        raise AssertionError(f"no checkpoint after {before}")
