"""Files that were damaged: what reads them must say so, or come to the undisturbed result."""

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from faults_parts import Fault, Job, difference, shown
from faults_tools import Try
from faults_world import (
    CORPUS,
    EVALUATE,
    PIPED,
    REPLACED,
    RESUMED,
    RESUMED_SHARDED,
    RUN,
    SWEPT,
    everything,
    of_evaluation,
    of_report,
    of_run,
    of_stages,
    printed,
    tensors,
)

BINARY = (".bin", ".ckpt", ".distcp", ".safetensors", ".metadata", ".pt", ".npy", ".gz")
DAMAGED = re.compile(r"torn|damaged|checksum|missing|cannot be|no complete", re.IGNORECASE)
PROMPT = ("--prompt", "river", "--max_new_tokens", "6")


def generate(model: str, *needs: str) -> Job:
    return Job(f"generate of {model}", ("generate", "--ckpt", model, *PROMPT), needs, printed)


def begin(name: str, model: str, *needs: str, flags: tuple[str, ...] = ()) -> Job:
    argv = ("fit", "--config=fit.yaml", "--run=new", f"--init_from={model}", *flags)
    return Job(name, argv, (*CORPUS, *needs), of_run("new"), "logs")


def validate(run: str) -> Job:
    argv = ("validate", f"--config=logs/t/{run}/config.yaml", "--ckpt_path=last")
    return Job(f"validate {run}", argv, (*CORPUS, f"logs/t/{run}"), lambda folder, done: done.out)


FSDP2 = "--trainer.strategy=fsdp2"
LAST = "checkpoints/step-0000006.ckpt"
ONE, SHARDS = f"logs/t/a/{LAST}", f"logs/t/sharded/{LAST}"
FIT_NEW = Job("fit anew", ("fit", "--config=fit.yaml", "--run=new"), CORPUS, of_run("new"), "logs")
FIT_PACKED = Job(
    "fit, packed", (*FIT_NEW.argv, "--data.packing=BestFit"), CORPUS, of_run("new"), "logs"
)
VERIFY = Job("verify", ("corpus", "verify", "corpus"), ("corpus",), printed)
FROM_ONE = (
    RESUMED,
    generate("logs/t/a", *RUN),
    generate(ONE, *RUN),
    begin("init_from a file", ONE, "logs/t/a"),
    validate("a"),
    Job("evaluate of a file", ("evaluate", ONE, *EVALUATE.argv[2:]), EVALUATE.needs, of_evaluation),
    Job("export of a file", ("export", ONE, "out"), RUN, everything("out")),
    Job("inspect", ("checkpoint", "inspect", ONE), RUN, printed),
)
FROM_SHARDS = (
    RESUMED_SHARDED,
    generate("logs/t/sharded", *CORPUS, "logs/t/sharded"),
    begin("init_from shards", SHARDS, "logs/t/sharded"),
    begin("init_from shards, sharded", SHARDS, "logs/t/sharded", flags=(FSDP2,)),
    Job("inspect shards", ("checkpoint", "inspect", SHARDS), ("logs/t/sharded",), printed),
    Job("consolidate shards", ("checkpoint", "consolidate", SHARDS, "out.ckpt"),
        ("logs/t/sharded",), lambda folder, done: tensors(folder / "out.ckpt")),
)  # fmt: skip
FROM_EXPORT = (
    generate("hf", "hf"),
    generate("reference", "reference"),
    begin("init_from an export", "reference", "reference"),
    Job("import of it", ("import", "reference", "out.ckpt"), ("reference",),
        lambda folder, done: tensors(folder / "out.ckpt")),
    Job("evaluate of it", ("evaluate", "hf", *EVALUATE.argv[2:]), ("hf", "t.txt"), of_evaluation),
)  # fmt: skip
OF_RUN = (
    RESUMED,
    validate("a"),
    Job("results", ("results", "logs/t"), ("logs/t/a", "logs/t/packed"), printed),
    generate("logs/t/a", *RUN),
)
STATUS = Job("sweep status", ("sweep", "status", "logs/s"), ("logs/s",), printed)
REPORT = Job("sweep report", ("sweep", "report", "logs/s"), ("logs/s",), of_report)
AGAIN = Job("sweep run again", SWEPT.argv, (*SWEPT.needs, "logs/s"), of_report)


TRAINS = (FIT_NEW, FIT_PACKED, RESUMED)
OF_LAST = (FROM_ONE[1], FROM_ONE[4])  # of a run's last checkpoint, whichever it is
READS = (*OF_RUN[1:3], STATUS, REPORT)


def faults() -> list[Fault]:
    """The rows: for each kind of file, all of its files x all kinds of damage x all readers."""
    kinds: list[tuple[str, str, str, tuple[Job, ...]]] = [
        ("corpus, that is trained on", "corpus", "[!.]*", (FIT_NEW, FIT_PACKED, RESUMED)),
        ("corpus, verified or prepared again", "corpus", "*", (VERIFY, REPLACED)),
        ("packing's index", "corpus", "*.index/*", (FIT_PACKED,)),
        ("checkpoint, one file", ".", "step-*.ckpt", FROM_ONE),
        ("checkpoint, sharded", ".", "step-*.ckpt/*", FROM_SHARDS),
        ("exported folder", ".", "*.json|*.safetensors", FROM_EXPORT),
        ("run folder", "logs/t", "*.json|*.jsonl|*.yaml", OF_RUN),
        ("sweep folder", "logs/s", "*.json|*.jsonl|*.yaml|fit.log|lock", (STATUS, REPORT, AGAIN)),
        ("pipeline folder", "logs/p", "*.json|*.jsonl|*.yaml|fit.log|lock",
         (Job("pipeline again", PIPED.argv, (*PIPED.needs, "logs/p"), of_stages),)),
        ("evaluation folder", "e", "*",
         (Job("evaluate again", EVALUATE.argv, (*EVALUATE.needs, "e"), of_evaluation),)),
    ]  # fmt: skip
    return [
        Fault(
            "damage",
            name,
            lambda one, where=where, glob=glob, jobs=jobs: damaged(one, where, glob, jobs),
        )
        for name, where, glob, jobs in kinds
    ]


def damaged(one: Try, where: str, glob: str, jobs: tuple[Job, ...]) -> None:
    """One file, one damage, one reader; all combinations in an order that the seed decides."""
    job = jobs[one.index % len(jobs)]
    expected, _, _ = one.bench.expected(job)
    one.copy(*job.needs)
    files = targets(one.folder / where, glob, job)
    ways = [(file, how) for file in files for how in DAMAGE if suits(file, how, job)]
    order = random.Random(f"{one.bench.seed}/{one.key}/{job.name}").sample(ways, len(ways))
    file, how = order[one.index // len(jobs) % len(order)]
    what = DAMAGE[how](one, file)
    place = file.relative_to(one.folder)
    one.notes.append(f"{place} {what}; {shown(job.argv)}")
    done = one.run(job.argv)
    names = (file.name, str(place.parent), str(place))
    if done.hung:
        return
    if done.code not in (0,):
        if one.names(done, names):
            one.count("detected", done.last)
        return
    said = any(name in done.err for name in names) or says_so(done.out, names)
    if said:
        one.count("detected", done.last)
    try:
        facts = job.facts(one.folder, done)
    except Exception as error:
        facts = f"{type(error).__name__}: {error}"
    if facts == expected:
        one.count("recovered")
    elif not said:
        one.count("silent", difference(expected, facts))


def says_so(text: str, names: Iterable[str]) -> bool:
    """Whether a line of a table or of a report names what is damaged, or the run in which it is."""
    runs = ["/".join(Path(name).parts[2:4]) for name in names if name.startswith("logs/s/")]
    about = [line for line in text.splitlines() if DAMAGED.search(line)]
    return any(name in line for line in about for name in [*names, *runs] if name)


def targets(folder: Path, glob: str, job: Job) -> list[Path]:
    """Files of these patterns that the command reads; the newest of checkpoints."""
    found = [path for one in glob.split("|") for path in folder.rglob(one) if path.is_file()]
    found = [path for path in found if "tfevents" not in path.name]
    steps = [next((p for p in path.parts if p.startswith("step-")), "") for path in found]
    if any(steps) and glob.startswith("step-"):
        found = [path for path, step in zip(found, steps, strict=True) if step == max(steps)]
    return sorted(set(found))


# Damage


def flip(one: Try, file: Path) -> str:
    """A bit of a binary file, or the high bit of a byte of text (a digit that became another digit
    is damage that nothing can see)."""
    content = bytearray(file.read_bytes())
    if not content:
        return "is empty, as it was"
    at = one.random.randrange(len(content))
    bit = one.random.randrange(8) if file.name.endswith(BINARY) else 7
    content[at] ^= 1 << bit
    write(file, content)
    return f"bit {bit} of byte {at} of {len(content)} flipped"


def zeros(one: Try, file: Path) -> str:
    """A page of zeros, as after a crash of the file system."""
    content = bytearray(file.read_bytes())
    at = one.random.randrange(max(1, len(content)))
    length = min(len(content) - at, 4096)
    content[at : at + length] = bytes(length)
    write(file, content)
    return f"{length} bytes at {at} of {len(content)} zeroed"


def truncate(one: Try, file: Path) -> str:
    content = file.read_bytes()
    length = one.random.randrange(max(1, len(content)))
    write(file, content[:length])
    return f"cut to {length} of {len(content)} bytes"


def empty(one: Try, file: Path) -> str:
    write(file, b"")
    return "emptied"


def remove(one: Try, file: Path) -> str:
    file.unlink()
    return "deleted"


def swap(one: Try, file: Path) -> str:
    """The content of another file of the same kind, or of any."""
    others = [p for p in one.folder.rglob(f"*{file.suffix}") if p.is_file() and p != file]
    others = [p for p in others if p.read_bytes() != file.read_bytes()] or [one.folder / "fit.yaml"]
    other = one.random.choice(sorted(others))
    if not other.exists():
        return truncate(one, file)
    write(file, other.read_bytes())
    return f"replaced by {other.relative_to(one.folder)}"


def garbage(one: Try, file: Path) -> str:
    write(file, one.random.randbytes(300))
    return "replaced by random bytes"


def odd(one: Try, file: Path) -> str:
    """JSON of another kind than expected."""
    text = one.random.choice(
        ["[]", "null", "3", '"x"', "{}", "[[]]", '{"step": null}', '{"a": 1e999}']
    )
    write(file, text.encode() + b"\n")
    return f"replaced by {text}"


def grown(one: Try, file: Path) -> str:
    write(file, file.read_bytes() + one.random.randbytes(10))
    return "10 bytes longer"


def a_folder(one: Try, file: Path) -> str:
    file.unlink()
    file.mkdir()
    return "replaced by a folder"


def write(file: Path, content: bytes | bytearray) -> None:
    """With a new inode, as hard links would be damaged too."""
    file.unlink()
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Try, Path], str]] = {
    "flip": flip,
    "flip again": flip,
    "zeros": zeros,
    "truncate": truncate,
    "empty": empty,
    "remove": remove,
    "swap": swap,
    "garbage": garbage,
    "odd": odd,
    "grown": grown,
    "folder": a_folder,
}


def suits(file: Path, how: str, job: Job) -> bool:
    """Whether the damage is one for this kind of file, and one that can be seen at all: a run
    without result or log is an unfinished one, and the last checkpoint is the last one there is;
    text has no checksums, and training does not compare terabytes of tokens with theirs."""
    text = not file.name.endswith(BINARY)
    if how == "odd":
        return file.suffix in (".json", ".jsonl")
    if how == "remove" and ((job in READS and text) or (job in OF_LAST and file.suffix == ".ckpt")):
        return False
    if how == "swap" and text and "logs" in file.parts:
        return False
    in_place = how in ("flip", "flip again", "zeros", "garbage", "swap")
    return not (in_place and file.name == "tokens.bin" and job in TRAINS)
