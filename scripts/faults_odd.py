"""Cases of `faults_hostile`: YAML, numbers and JSON made to take all time and memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults_damage import PROMPT
from faults_parts import Case
from faults_world import CORPUS, FIT_ARGV, PIPELINE, RUN, SWEEP


def bombs() -> Iterator[Case]:
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
    )
    merges = "b0: &b0 {x: 1}\n" + "".join(
        f"b{n}: &b{n} {{p: *b{n - 1}, q: *b{n - 1}, r: *b{n - 1}}}\n" for n in range(1, 25)
    )
    texts = {
        "laughs": laughs,
        "merges": merges,
        "deep-flow": "a: " + "[" * 20_000,
        "deep-closed": "a: " + "[" * 3_000 + "]" * 3_000,
        "deep-block": "".join(" " * n + "a:\n" for n in range(2_000)),
        "itself": "a: &a [*a]\n",
        "long-key": "k" * 2_000_000 + ": 1\n",
        "many-keys": "".join(f"k{n}: 1\n" for n in range(100_000)),
        "digits": "seed_everything: " + "9" * 100_000 + "\n",
        "zero": "a: \x00\n",
        "nothing": "",
        "list": "- 1\n- 2\n",
        "text": "just words\n",
        "latin": "a: caf\xe9\n".encode("latin-1"),
        "utf16": "a: 1\n".encode("utf-16"),
        "tab": "a:\n\tb: 1\n",
        "documents": "a: 1\n---\nb: 2\n",
    }
    for name, text in texts.items():
        files = (("x.yaml", text),)
        accepted = name == "nothing"
        yield Case((*FIT_ARGV, "--config=x.yaml"), CORPUS, files, ("x.yaml", "seed_everything"),
                   refused=not accepted)  # fmt: skip
        yield Case(("sweep", "init", "x.yaml"), CORPUS, files, ("x.yaml",))
        yield Case(("pipeline", "x.yaml", "--dry"), CORPUS, files, ("x.yaml",))
        yield Case(("estimate", "x.yaml"), CORPUS, files, ("x.yaml", "model"))
    endless = {"low": 0.1, "high": 1e999}
    loops: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
        (("sweep", "init", "x.yaml"), {**SWEEP, "base": ["x.yaml"]}),
        (("sweep", "run", "x.yaml"), {**SWEEP, "base": ["x.yaml"]}),
        (("pipeline", "x.yaml", "--dry"), {**PIPELINE, "like": "x.yaml"}),
        (("pipeline", "x.yaml"), {**PIPELINE, "base": ["x.yaml"]}),
        ((*FIT_ARGV, "--config=x.yaml"), {"model": "x.yaml"}),
        ((*FIT_ARGV, "--config=x.yaml"), {"model": {"position": "x.yaml"}}),
        ((*FIT_ARGV, "--config=x.yaml"), {"config": "x.yaml"}),
        ((*FIT_ARGV, "--config=x.yaml"), {"data": "x.yaml"}),
        (("sweep", "init", "x.yaml"), {**SWEEP, "set": {"model.position": "x.yaml"}}),
        (("sweep", "init", "x.yaml"), {**SWEEP, "axes": {"model.network.num_layers": [*range(1, 9)],
                                                       "seed_everything": [*range(9)]}}),
        (("sweep", "init", "x.yaml"), {**SWEEP, "seeds": [*range(10**5)] * 2}),
        (("sweep", "init", "x.yaml"), {**SWEEP, "sampler": "random", "trials": 3,
                                       "search": {"model.optimizer.lr": endless}}),
    )  # fmt: skip
    for argv, content in loops:
        yield Case(argv, CORPUS, (("x.yaml", content),), ("x.yaml",))


NUMBERS: dict[str, tuple[Any, ...]] = {
    "model.network.num_layers": (200_000, 0, -1, 1.5, "many", None, [1]),
    "model.network.hidden_size": (65536, 10**9, 10**30, 0, 7, "x"),
    "model.network.vocab_size": (10**15, 0, 3),
    "model.network.num_heads": (10**9, 3, 0),
    "model.optimizer.lr": ("nan", "inf", -1, "x"),
    "data.sequence_length": (0, -3, 10**12, 1.5),
    "data.global_batch_size": (0, 10**12, 3, -4),
    "data.micro_batch_size": (0, 10**12, 3),
    "data.num_workers": (-1, 10**6),
    "trainer.max_steps": (-5, "x", 1.5),
    "trainer.devices": (0, -7, 10**6),
    "trainer.gradient_clip_val": (-1, "nan"),
    "seed_everything": (-1, 2**70, "x"),
    "checkpoint.every_n_steps": (-1,),
    "checkpoint.keep": (-1,),
    "metrics.every_n_steps": (0, -1),
    "guard.stop_after": (-1,),
}


def sizes() -> Iterator[Case]:
    for key, values in NUMBERS.items():
        for value in values:
            name = key.rpartition(".")[2]
            names = (
                name,
                {"num_heads": "num_kv_heads", "hidden_size": "num_heads"}.get(name, name),
                "memory",
            )
            yield Case((*FIT_ARGV, f"--{key}={json.dumps(value)}"), CORPUS, names=names)
    argv = (*FIT_ARGV, "--data.sequence_length=1")
    yield Case(argv, CORPUS, names=("sequence_length",), refused=False)
    for argv in (FIT_ARGV, (*FIT_ARGV, "--guard.stop_after=2")):
        yield Case((*argv, "--model.optimizer.lr=1e10"), CORPUS, check=no_number)
    for name in (
        "layers",
        "width",
        "vocabulary",
        "negative",
        "fraction",
        "text",
        "null",
        "list",
    ):
        for argv in (
            ("generate", "--ckpt", "m", *PROMPT),
            ("import", "m", "out.ckpt"),
            ("evaluate", "m", "--suite", "perplexity", "--text", "t.txt", "--lengths", "16"),
            ("export", "m", "out"),
        ):
            needs = (f"hostile/config-{name}->m", "t.txt")
            yield Case(argv, needs, names=("m/", "m:", "num_", "hidden_size", "config.json"))
        more = (*CORPUS, f"hostile/config-{name}->m")
        yield Case((*FIT_ARGV, "--init_from=m"), more, names=("m/", "m:", "config.json"))
    for flag in ("--max_new_tokens=100000000000", "--max_new_tokens=0", "--temperature=nan",
                 "--temperature=-1", "--top_k=0", "--top_p=2", "--seed=-1", f"--seed={2**70}",
                 "--batch_size=0"):  # fmt: skip
        yield Case(("generate", "--ckpt", "logs/t/a", "--prompt", "river", flag), RUN,
                   names=(flag[2:].partition("=")[0], "temperature", "memory"),
                   refused=flag != "--seed=-1")  # fmt: skip


def no_number(folder: Path) -> str | None:
    """Whether a result has numbers that are none."""
    result = folder / "logs" / "t" / "new" / "result.json"
    return "result.json has NaN" if result.exists() and "NaN" in result.read_text() else None


# Files of JSON


JSON: dict[str, str] = {
    "deep": "[" * 200_000,
    "deep-objects": '{"a":' * 200_000,
    "closed": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "number": '{"step": ' + "9" * 10_000 + "}",
    "nan": '{"step": NaN, "train/loss": Infinity}',
    "list": "[1, 2]",
    "surrogate": '{"variant": "\\ud800", "seed": 0, "steps": "\\udfff"}',
    "long": '{"x": "' + "y" * 3_000_000 + '"}',
}


def odd_json() -> Iterator[Case]:
    again = ("fit", "--config=fit.yaml", "--run=half-a", "--resume=auto")
    evaluated = ("evaluate", "logs/t/a", "--suite", "perplexity", "--text", "t.txt", "--lengths",
                 "16", "--out", "e")  # fmt: skip
    rope = "logs/s/rope/seed-0"
    sweep = (("sweep", "status", "logs/s"), ("sweep", "report", "logs/s"),
             ("sweep", "run", "s.yaml"))  # fmt: skip
    readers_of: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = (
        ("corpus/train/meta.json", CORPUS, (FIT_ARGV, ("corpus", "verify", "corpus"))),
        ("corpus/train/shards.json", CORPUS, (FIT_ARGV, ("corpus", "inspect", "corpus"))),
        ("logs/t/half-a/result.json", (*CORPUS, "logs/t/half-a"), (again, ("results", "logs/t"))),
        ("logs/t/half-a/metrics.jsonl", (*CORPUS, "logs/t/half-a"), (again,)),
        (f"{rope}/trial.json", ("logs/s", *CORPUS, "s.yaml"), sweep),
        (f"{rope}/result.json", ("logs/s", *CORPUS, "s.yaml"), sweep),
        (f"{rope}/metrics.jsonl", ("logs/s",),
         (("sweep", "status", "logs/s"), ("sweep", "report", "logs/s"))),
        (f"{rope}/outcome.json", ("logs/s",), (("sweep", "status", "logs/s"),)),
        ("logs/s/sweep.json", ("logs/s", *CORPUS, "s.yaml"),
         (("sweep", "status", "logs/s"), ("sweep", "run", "s.yaml"))),
        ("e/items.jsonl", (*RUN, "t.txt", "e"), (evaluated,)),
        ("e/evaluation.json", (*RUN, "t.txt", "e"), (evaluated,)),
        ("hf/config.json", ("hf",), (("generate", "--ckpt", "hf", *PROMPT),)),
        ("hf/tokenizer_config.json", ("hf",), (("generate", "--ckpt", "hf", *PROMPT),)),
        ("p.jsonl", RUN, (("generate", "--ckpt", "logs/t/a", "--file", "p.jsonl"),)),
        ("text/z.jsonl", ("text",), (("prepare", "text", "--out", "new", "--tokenizer", "bytes"),)),
    )  # fmt: skip
    for file, needs, commands in readers_of:
        for text in JSON.values():
            for argv in commands:
                names = (Path(file).name, Path(file).parent.name)
                yield Case(argv, needs, ((file, text + "\n"),), names, refused=False)
