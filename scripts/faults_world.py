"""What the faults happen to: a small text, corpus, runs, sweep, pipeline, exports; and the commands
that make them, with what is to come of each."""

import csv
import gzip
import hashlib
import json
import logging
import random
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import yaml

from faults_parts import Done, Job, clear
from faults_tools import SCRIPTS, Bench, Try

FIT = {
    "experiment": "t",
    "seed_everything": 3,
    "model": {
        "network": {"vocab_size": 257, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
                    "num_kv_heads": 1, "ffn_size": 16},
        "position": "RoPEppEC",
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "class_path": "CorpusDataModule",
        "init_args": {"corpus": "corpus", "sequence_length": 32, "global_batch_size": 4,
                      "micro_batch_size": 2, "validate_every_n_steps": 3},
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 6, "enable_progress_bar": False},
    "metrics": {"every_n_steps": 1},
    "checkpoint": {"every_n_steps": 2, "keep": 2},
}  # fmt: skip
SHORT = {"trainer.max_steps": 4, "checkpoint.every_n_steps": 2}
EC = {"class_path": "RoPEppEC"}
SWEEP = {
    "name": "s",
    "question": "Does it hold?",
    "base": ["fit.yaml"],
    "set": SHORT,
    "variants": {"rope": {"model.position": {"class_path": "RoPE"}},
                 "ec": {"model.position": {"class_path": "RoPEppEC"}}},
    "seeds": [0],
}  # fmt: skip
PIPELINE = {
    "name": "p",
    "base": ["fit.yaml"],
    "variants": {"ec": None},
    "stages": [
        {"name": "one", "set": SHORT},
        {"name": "two", "after": "one", "set": {**SHORT, "data.sequence_length": 64}},
    ],
}
PREPARE = ("--tokenizer", "bytes", "--validation_fraction", "0.12")
FIT_ARGV = ("fit", "--config=fit.yaml", "--run=new")
TEXT, CORPUS = ("text",), ("corpus", "fit.yaml")
RUN = (*CORPUS, "logs/t/a")
EVALUATION = ("evaluate", "logs/t/a", "--suite", "perplexity", "--text", "t.txt", "--lengths", "16",
              "32", "--out", "e")  # fmt: skip
# Other times, machines and speeds make no other result.
RESULT = ("evaluation", "loss_by_position", "steps", "tokens", "train_loss", "validation_loss",
          "skipped_steps", "parameters", "seed", "variant")  # fmt: skip


KEEP_ALL, PACKED = "--checkpoint.keep=0", "--data.packing=BestFit"
# What there is in the world: for the names that come of it what they need, and the commands.
PARTS: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    ("text", "t.txt", "fit.yaml", "s.yaml", "p.yaml", "ec.yaml"): ((), ()),
    ("corpus", "logs/t/packed"): (
        ("text", "fit.yaml"),
        (
            ("prepare", "text", "--out", "corpus", *PREPARE),
            ("fit", "--config=fit.yaml", "--run=packed", PACKED),
        ),
    ),
    ("logs/t/a", "logs/t/half-a"): (CORPUS, (("fit", "--config=fit.yaml", "--run=a", KEEP_ALL),)),
    ("logs/t/sharded", "logs/t/half-sharded"): (
        CORPUS,
        (("fit", "--config=fit.yaml", "--run=sharded", KEEP_ALL, "--trainer.strategy=fsdp2"),),
    ),
    ("logs/t/rope",): (
        CORPUS,
        (("fit", "--config=fit.yaml", "--run=rope", "--model.position=RoPE"),),
    ),
    ("logs/s",): ((*CORPUS, "s.yaml"), (("sweep", "run", "s.yaml"),)),
    ("logs/p",): ((*CORPUS, "p.yaml"), (("pipeline", "p.yaml"),)),
    ("hf", "reference"): (
        RUN,
        (
            ("export", "logs/t/a", "hf"),
            ("export", "logs/t/a", "reference", "--format=reference"),
        ),
    ),
    ("e",): ((*RUN, "t.txt"), (EVALUATION,)),
    ("hostile",): (("logs/t/a", "logs/t/sharded", "hf", "reference"), ()),
}


def provide(bench: Bench, name: str) -> None:
    """Makes a part of the world that is not there yet, with what it needs.

    Raises:
        RuntimeError: A command fails although nothing disturbs it.
    """
    names = next(names for names in PARTS if any(f"{name}/".startswith(f"{one}/") for one in names))
    stamp = bench.folder / ("made-" + names[0].replace("/", "-"))
    if stamp.exists():
        return
    needs, commands = PARTS[names]
    for need in needs:
        provide(bench, need)
    for one in names:
        clear(bench.world / one)
    if names[0] == "text":
        write_text(bench.world)
        for file, content in (("fit", FIT), ("s", SWEEP), ("p", PIPELINE), ("ec", EC)):
            (bench.world / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    if names[0] == "hostile":
        forged = [bench.python, str(SCRIPTS / "faults_forge.py"), str(bench.world)]
        subprocess.run(forged, check=True, env=bench.environment)
    with Try(bench, f"the world-{names[0]}", 0) as scratch:
        scratch.copy(*needs)
        for words in commands:
            done = scratch.run(words)
            if done.code or done.hung:
                raise RuntimeError(f"undisturbed, {' '.join(words)} fails: {done.text[-3000:]}")
        if len(names) == 2 and names[1].startswith("logs/t/half-"):
            half(scratch.folder / names[0], scratch.folder / names[1])
        for one in names if commands else ():
            (bench.world / one).parent.mkdir(parents=True, exist_ok=True)
            (scratch.folder / one).rename(bench.world / one)
    stamp.touch()


def half(whole: Path, target: Path) -> None:
    """The same run as after a kill past its last step."""
    shutil.copytree(whole, target)
    (target / "result.json").unlink()
    last = target / "checkpoints" / "step-0000006.ckpt"
    last.unlink() if last.is_file() else shutil.rmtree(last)


def write_text(world: Path) -> None:
    """Documents in several kinds of files."""
    draw = random.Random(1)
    words = ["the", "of", "river", "stone", "market", "wind", "lantern", "bridge", "winter"]

    def document() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(8, 30))) + ".\n"

    def lines(count: int) -> bytes:
        return b"".join(json.dumps({"text": document()}).encode() + b"\n" for _ in range(count))

    text = world / "text"
    (text / "c").mkdir(parents=True)
    (text / "a.jsonl").write_bytes(lines(20))
    (text / "b.jsonl.gz").write_bytes(gzip.compress(lines(20), mtime=0))
    for number in range(3):
        (text / "c" / f"{number}.txt").write_text(document() * 3)
    (world / "t.txt").write_text("".join(document() for _ in range(4)))


# What has come of a command


def everything(name: str) -> Any:
    """All bytes of a folder or file."""

    def facts(folder: Path, done: Done) -> dict[str, str]:
        place = folder / name
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        return {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }

    return facts


def printed(folder: Path, done: Done) -> str:
    """Standard output alone."""
    return done.out


def tensors(file: Path) -> dict[str, Any]:
    """Checksums of a checkpoint's tensors, read without its own code or ours."""
    if file.is_dir():
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in file.glob("*.distcp")}
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return {name.partition("/")[2]: archive.getinfo(name).CRC for name in names}


def checkpoint(name: str) -> Any:
    def facts(folder: Path, done: Done) -> dict[str, Any]:
        return tensors(folder / name)

    return facts


def run_facts(run: Path) -> dict[str, Any]:
    """A run's curve, steps in TensorBoard, result and last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {key: value for key, value in line.items() if not key.startswith("utilisation/")}
        for line in lines
    ]
    result = json.loads((run / "result.json").read_text())
    last = max((run / "checkpoints").iterdir())
    return {
        "curve": curve,
        "tensorboard": shown_steps(run),
        "result": {key: result.get(key) for key in RESULT},
        "checkpoint": {"name": last.name, **tensors(last)},
    }


def shown_steps(run: Path) -> list[int]:
    """The steps at which TensorBoard shows the training loss."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    known = "train/loss" in events.Tags()["scalars"]
    return [event.step for event in events.Scalars("train/loss")] if known else []


def of_run(name: str) -> Any:
    def facts(folder: Path, done: Done) -> dict[str, Any]:
        return run_facts(folder / "logs" / "t" / name)

    return facts


def of_sweep(folder: Path, done: Done) -> dict[str, Any]:
    runs = {name: run_facts(folder / "logs" / "s" / name / "seed-0") for name in ("rope", "ec")}
    report = {"report.csv": (folder / "logs" / "s" / "report.csv").exists()}
    return {**runs, **report}


def of_pipeline(folder: Path, done: Done) -> dict[str, Any]:
    runs = {name: run_facts(folder / "logs" / "p" / "ec" / name) for name in ("one", "two")}
    return {**runs, "table": "| ec/two |" in (folder / "logs" / "p" / "pipeline.md").read_text()}


def of_report(folder: Path, done: Done) -> list[dict[str, str]]:
    """A sweep's table, without speeds."""
    with (folder / "logs" / "s" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("variant", "name", "seeds", "mean", "difference", "verdict", "parameters")
    return [{key: row[key] for key in keys} for row in rows]


def of_stages(folder: Path, done: Done) -> list[list[str]]:
    """A pipeline's table, without speeds."""
    lines = (folder / "logs" / "p" / "pipeline.md").read_text().splitlines()
    return [line.split("|")[1:11] for line in lines if line.startswith("| ec/")]


def of_evaluation(folder: Path, done: Done) -> dict[str, Any]:
    content = json.loads((folder / "e" / "evaluation.json").read_text())
    return {"results": content["results"], "csv": (folder / "e" / "evaluation.csv").read_text()}


# Commands that write

PREPARED = Job("prepare", ("prepare", "text", "--out", "corpus", *PREPARE), TEXT,
               everything("corpus"), "corpus")  # fmt: skip
REPLACED = Job("prepare --overwrite", (*PREPARED.argv, "--overwrite", "true"), (*TEXT, "corpus"),
               everything("corpus"), "corpus")  # fmt: skip
FITTED = Job("fit", (*FIT_ARGV, "--resume=auto"), CORPUS,
             of_run("new"), "logs")  # fmt: skip
SHARDED = Job("fit, sharded", (*FITTED.argv, "--trainer.strategy=fsdp2"), CORPUS, of_run("new"),
              "logs")  # fmt: skip
LONGER = Job(
    "fit of 90 steps",
    (*FITTED.argv, "--trainer.max_steps=90", "--data.validate_every_n_steps=45",
     "--checkpoint.every_n_steps=15"),
    CORPUS, of_run("new"), "logs",
)  # fmt: skip
RESUMED = Job("resume", ("fit", "--config=fit.yaml", "--run=half-a", "--resume=auto"),
              (*CORPUS, "logs/t/half-a"), of_run("half-a"), "logs")  # fmt: skip
RESUMED_SHARDED = Job(
    "resume, sharded",
    ("fit", "--config=fit.yaml", "--run=half-sharded", "--resume=auto", "--trainer.strategy=fsdp2"),
    (*CORPUS, "logs/t/half-sharded"), of_run("half-sharded"), "logs",
)  # fmt: skip
EVALUATE = Job(
    "evaluate",
    EVALUATION,
    (*RUN, "t.txt"), of_evaluation, "e",
)  # fmt: skip
SWEPT = Job("sweep", ("sweep", "run", "s.yaml"), (*CORPUS, "s.yaml"), of_sweep, "logs")
PIPED = Job("pipeline", ("pipeline", "p.yaml"), (*CORPUS, "p.yaml"), of_pipeline, "logs")
EXPORTED = Job("export", ("export", "logs/t/a", "out"), RUN, everything("out"), "out")
IMPORTED = Job("import", ("import", "reference", "out.ckpt"), ("reference",),
               checkpoint("out.ckpt"), "out.ckpt")  # fmt: skip
CONSOLIDATED = Job(
    "consolidate",
    ("checkpoint", "consolidate", "logs/t/sharded/checkpoints/step-0000006.ckpt", "out.ckpt"),
    ("logs/t/sharded",), checkpoint("out.ckpt"), "out.ckpt",
)  # fmt: skip
GENERATED = Job(
    "generate --out",
    ("generate", "--ckpt", "logs/t/a", "--prompt", "river", "--prompt", "stone",
     "--max_new_tokens", "8", "--out", "out.jsonl"),
    RUN, everything("out.jsonl"), "out.jsonl",
)  # fmt: skip
CONVERTED = Job(
    "convert",
    ("convert", "logs/t/rope", "out.ckpt", "--position", "ec.yaml"),
    (*CORPUS, "logs/t/rope", "ec.yaml"),
    checkpoint("out.ckpt"),
    "out.ckpt",
)
CONFIGS = Job("configs", ("configs", "out"), (), everything("out"), "out")
WRITERS = (PREPARED, REPLACED, FITTED, SHARDED, EVALUATE, SWEPT, PIPED, EXPORTED, IMPORTED,
           CONSOLIDATED, GENERATED, CONFIGS, CONVERTED)  # fmt: skip
