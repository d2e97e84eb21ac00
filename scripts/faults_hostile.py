"""Files and names made to run something, to write elsewhere, or to take all time and memory:
refused in one line, or harmless."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from faults_damage import PROMPT
from faults_forge import COMMAND, PICKLES
from faults_odd import bombs, no_number, odd_json, sizes
from faults_parts import Case, Fault, shown
from faults_tools import Try
from faults_world import CORPUS, FIT_ARGV, PIPELINE, SWEEP

MEMORY = 4 << 30  # bytes beyond the server's, of which nothing here may need a quarter


def faults() -> list[Fault]:
    """The rows; each goes through its cases."""
    rows: dict[str, Callable[[], Iterator[Case]]] = {
        "pickles in checkpoints": pickles_in_checkpoints,
        "pickles in sharded checkpoints": pickles_in_shards,
        "pickles and code in folders": pickles_in_folders,
        "classes and contents in checkpoints": contents,
        "classes and tags in YAML": classes_in_yaml,
        "bombs, depths and loops in YAML": bombs,
        "sizes and numbers": sizes,
        "deep, odd and huge JSON": odd_json,
        "paths that lead elsewhere": escapes,
        "HTML in names": html,
    }
    found = []
    for name, cases in rows.items():
        some = list(cases())
        found.append(Fault("hostile", name, lambda one, some=some: hostile(one, some), len(some)))
    return found


def hostile(one: Try, cases: list[Case]) -> None:
    """One case."""
    order = random.Random(f"{one.bench.seed}/{one.key}").sample(cases, len(cases))
    case = order[one.index % len(cases)]
    one.copy(*case.needs)
    for name, content in case.files:
        file = one.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            continue
        file.unlink(missing_ok=True)
        if not isinstance(content, bytes | str):
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    for file in one.folder.glob("index-*"):  # a file of the packing's index, whatever its name
        parts = sorted(one.folder.glob("corpus/train/*.index/*"))
        shutil.move(file, parts[int(file.name[6:]) % len(parts)])
    one.notes.append(f"{shown(case.argv)[:200]}; {', '.join([*case.needs, *dict(case.files)])}")
    done = one.run(case.argv, seconds=40.0, memory=MEMORY)
    wrong = case.check(one.folder)
    if done.hung or "tracebacks" in one.said:
        return
    if wrong:
        one.count("silent", wrong)
    elif done.code == 0 and case.refused:
        one.count("silent", f"accepted: {done.last}")
    elif done.code == 0:
        one.count("recovered")
    elif done.code in (75, 76) or one.names(
        done, case.names
    ):  # of a run that has ended on purpose, and says why
        one.count("detected", done.last)


# Pickles


def readers(place: str, name: str) -> Iterator[Case]:
    """All that reads a checkpoint, of one that lies at ``place`` in the world."""
    names = (Path(place).name, "step-0000009.ckpt", "a folder of", "checkpoint")
    model = "ck.ckpt"
    for argv, needs in (
        (("generate", "--ckpt", model, *PROMPT), ()),
        ((*FIT_ARGV, f"--init_from={model}"), CORPUS),
        ((*FIT_ARGV, f"--ckpt_path={model}"), CORPUS),
        ((*FIT_ARGV, f"--ckpt_path={model}", "--trainer.strategy=fsdp2"), CORPUS),
        ((*FIT_ARGV, f"--init_from={model}", "--init_optimizer=true"), CORPUS),
        (("validate", "--config=fit.yaml", f"--ckpt_path={model}"), CORPUS),
        (("evaluate", model, "--suite", "perplexity", "--text", "t.txt", "--lengths", "16",
          "--out", "e"), ("t.txt",)),
        (("export", model, "out"), ()),
        (("checkpoint", "inspect", model), ()),
        (("checkpoint", "consolidate", model, "out.ckpt"), ()),
        (("analyze", "noise", model, "--text", "t.txt"), ("t.txt",)),
    ):  # fmt: skip
        yield Case(argv, (*needs, f"{place}->{model}"), names=(model, *names),
                   refused="inspect" not in argv)  # fmt: skip


def pickles_in_checkpoints() -> Iterator[Case]:
    for name in PICKLES:
        for kind in ("raw", "archive", "within"):
            yield from readers(f"hostile/{kind}-{name}.ckpt", name)


def pickles_in_shards() -> Iterator[Case]:
    for name in PICKLES:
        for part in ("metadata", "meta.pt"):
            yield from readers(f"hostile/shards-{part}-{name}.ckpt", name)
    yield from readers("hostile/shards-bytes.ckpt", "bytes")
    resume = ("fit", "--config=fit.yaml", "--run=sharded", "--resume=auto", "--trainer.max_steps=9",
              "--trainer.strategy=fsdp2")  # fmt: skip
    newer = "checkpoints/step-0000009.ckpt"
    for name in PICKLES:  # the newest of a run, beside whole ones
        for part in ("metadata", "meta.pt"):
            newest = f"hostile/shards-{part}-{name}.ckpt->logs/t/sharded/{newer}"
            needs = (*CORPUS, "logs/t/sharded", newest)
            yield Case(resume, needs, names=("step-0000009.ckpt",), refused=False)


def pickles_in_folders() -> Iterator[Case]:
    for name in PICKLES:
        for file in ("model-safetensors", "pytorch_model-bin", "tokenizer-json"):
            place = f"hostile/folder-{file}-{name}->m"
            for argv in (
                ("generate", "--ckpt", "m", *PROMPT),
                ("import", "m", "out.ckpt"),
                ("export", "m", "out"),
            ):
                reads = file != "tokenizer-json" or argv[0] != "import"
                yield Case(argv, (place,), names=("m/", "m:", "tokenizer.json"), refused=reads)
    for argv in (("generate", "--ckpt", "m", *PROMPT), ("import", "m", "out.ckpt")):
        yield Case(argv, ("hostile/auto_map->m",), names=("m/",), refused=False)
    for file in ("corpus/tokenizer.json", "corpus/train/meta.json", "corpus/train/shards.json",
                 "corpus/train/offsets.bin"):  # fmt: skip
        for name in ("reduce", "dotted"):
            yield Case(FIT_ARGV, CORPUS, ((file, PICKLES[name]),), names=(file,),
                       refused="tokenizer" not in file)  # fmt: skip
    packed = (*FIT_ARGV, "--data.packing=BestFit")
    for number in range(4):
        yield Case(packed, (*CORPUS, f"hostile/objects.npy->index-{number}"), refused=False)


# Settings


def contents() -> Iterator[Case]:
    kinds = ("class", "popen", "optimizer", "layers", "width", "vocabulary", "text", "none", "list")
    for kind in kinds:
        for case in readers(f"hostile/settings-{kind}.ckpt", kind):
            yield Case(case.argv, case.needs, names=case.names, refused=False)
    for kind in ("no-weights", "weights-list", "step-text", "no-loops", "moments", "no-moments",
                 "callbacks", "tokenizer", "tokens", "in-a-list", "a-tensor"):  # fmt: skip
        for case in readers(f"hostile/content-{kind}.ckpt", kind):
            yield Case(case.argv, case.needs, names=case.names, refused=False)
    yield from readers("hostile/lists.ckpt", "lists")
    for argv, needs in (
        (("generate", "--ckpt", "ck.ckpt", *PROMPT), ()),
        ((*FIT_ARGV, "--init_from=ck.ckpt"), CORPUS),
    ):
        names = ("ck.ckpt", "finite", "NaN")
        with_nan = (*needs, "hostile/content-nan.ckpt->ck.ckpt")
        yield Case(argv, with_nan, names=names, check=no_number)


EVIL_CLASSES: tuple[Any, ...] = (
    {"class_path": "os.system", "init_args": {"command": COMMAND}},
    {"class_path": "subprocess.Popen", "init_args": {"args": COMMAND, "shell": True}},
    {"class_path": "subprocess.getoutput", "init_args": {"cmd": COMMAND}},
    {
        "class_path": "builtins.eval",
        "init_args": {"source": f"__import__('os').system('{COMMAND}')"},
    },
    {"class_path": "evil.Thing"},
)
PLACES = ("model.position", "model.optimizer", "model.schedule", "data", "data.packing",
          "trainer.callbacks", "trainer.logger", "trainer.strategy", "trainer.profiler",
          "trainer.plugins", "checkpoint", "metrics", "model.network", "suite")  # fmt: skip


def classes_in_yaml() -> Iterator[Case]:
    for place in PLACES:
        for value in EVIL_CLASSES:
            listed = [value] if place in ("trainer.callbacks", "trainer.plugins") else value
            more: dict[str, Any] = {}
            at = more
            *parents, last = place.split(".")
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = listed
            key = place.rpartition(".")[2]
            names = (key, "more.yaml", value["class_path"])
            yield Case((*FIT_ARGV, "--config=more.yaml"), CORPUS, (("more.yaml", more),), names)
    tags = (
        "!!python/object/apply:os.system [{c}]",
        "!!python/object/new:os.system [{c}]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/apply:subprocess.check_output [[sh, -c, '{c}']]",
        "!!python/tuple [1]",
    )
    for tag in tags:
        value = tag.format(c=COMMAND)
        text = f"model:\n  position: {value}\n"
        yield Case((*FIT_ARGV, "--config=more.yaml"), CORPUS, (("more.yaml", text),),
                   names=("more.yaml", "position"))  # fmt: skip
        yield Case((*FIT_ARGV, f"--model.position={value}"), CORPUS, names=("position",))
        for kind, content in (("sweep", SWEEP), ("pipeline", PIPELINE)):
            text = yaml.safe_dump(content) + f"question: {value}\n".replace("question", "logs")
            argv = (
                ("sweep", "init", "x.yaml") if kind == "sweep" else ("pipeline", "x.yaml", "--dry")
            )
            yield Case(argv, CORPUS, (("x.yaml", text),), names=("x.yaml",))
    for value in ("${oc.env:HOME}", "${resolve:x}", "${oc.decode:'!!python/name:os.system'}"):
        yield Case((*FIT_ARGV, f"--model.position={value}"), CORPUS, names=("position",))
    launcher = {**SWEEP, "launcher": "{python} -c pass {nothing}"}
    yield Case(("sweep", "run", "x.yaml"), CORPUS, (("x.yaml", launcher),), names=("x.yaml",))


# Elsewhere

ESCAPES = (
    "..",
    "../evil",
    "../../evil",
    "/tmp/ropepp-evil",
    "a/../../../evil",
    "./../evil",
    "a/../..",
)


def escapes() -> Iterator[Case]:
    for name in ESCAPES:
        yield Case((*FIT_ARGV[:2], f"--run={name}"), CORPUS, names=("run",), check=elsewhere)
        yield Case(
            (*FIT_ARGV, f"--experiment={name}"), CORPUS, names=("experiment",), check=elsewhere
        )
        for argv, content, key in (
            (("sweep", "run", "x.yaml"), {**SWEEP, "name": name}, "name"),
            (("sweep", "run", "x.yaml"), {**SWEEP, "variants": {name: None}}, "variants"),
            (("pipeline", "x.yaml"), {**PIPELINE, "name": name}, "name"),
            (("pipeline", "x.yaml"), {**PIPELINE, "variants": {name: None}}, "variants"),
            (("pipeline", "x.yaml"), {**PIPELINE, "stages": [{"name": name}]}, "stages"),
        ):  # fmt: skip
            yield Case(argv, CORPUS, (("x.yaml", content),), (key,), check=elsewhere)
        shards = json.dumps([{"name": name, "documents": 1, "tokens": 1, "text_bytes": 1,
                              "tokens_sha256": "", "offsets_sha256": ""}])  # fmt: skip
        yield Case(FIT_ARGV, CORPUS, (("corpus/train/shards.json", shards),), ("shards.json",))
    for argv in (("generate", "--ckpt", "m", *PROMPT), ("import", "m", "out.ckpt")):
        needs = ("hostile/escape->m", "hostile/elsewhere.safetensors->elsewhere.safetensors")
        yield Case(argv, needs, names=("index.json",))


def elsewhere(folder: Path) -> str | None:
    """Whether something was written where it must not be."""
    place = Path("/tmp/ropepp-evil")
    if place.exists():
        shutil.rmtree(place)
        return f"{place} was written"
    allowed = {*(Path(name).parts[0] for name in CORPUS), "logs", "x.yaml"}
    more = [path.name for path in folder.iterdir() if path.name not in allowed]
    inside = [p.name for p in (folder / "logs").glob("*") if p.name not in ("t", "s", "p", "a")]
    return f"written beside: {more + inside}" if more + inside else None


# HTML

MARKUP = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "[x](javascript:alert(1))",
    "`<b>`",
    "a|b\n\n<iframe src=//x>",
    "&lt;script&gt;",
)


def html() -> Iterator[Case]:
    for text in MARKUP:
        plan = {"name": "s", "question": text, "baseline": "rope", "variants": ["rope", "ec"],
                "display": {"rope": text, "ec": f"EC {text}"}}  # fmt: skip
        trial = {"variant": "rope", "seed": 0, "overrides": {}, "settings": {"position": text}}
        failed = {"state": "failed", "reason": text, "time": 1.0}
        for contents in (
            {"sweep.json": plan},
            {"rope/seed-0/trial.json": trial},
            {"ec/seed-0/result.json": {}, "ec/seed-0/outcome.json": failed},
        ):
            files = tuple((f"logs/s/{name}", json.dumps(one)) for name, one in contents.items())
            names = tuple(Path(name).name for name in contents)
            argv = ("sweep", "report", "logs/s")
            yield Case(argv, ("logs/s",), files, names, False, no_markup)


def no_markup(folder: Path) -> str | None:
    """Whether the report's page has something that a browser would run."""
    text = (folder / "logs/s/report.html").read_text().lower()
    for part in ("<script>alert", "<img src=x", "<svg onload", 'href="javascript:', "<iframe"):
        if part in text:
            return f"report.html has {part}"
    return None
