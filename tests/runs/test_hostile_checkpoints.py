"""Hostile files of models: refused in one line; nothing of them is run."""

import pickle
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.fit_runs import arguments
from helpers.saved_forms import STEPS, copied
from ropepp.checksums import CHECKSUMS
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop.saved import open_model
from ropepp.runs.checkpoints import consolidate, read_checkpoint
from ropepp.runs.shards import INDEX, seal
from ropepp.train.optim import AdamW
from ropepp.train.weights import load_optimizer_from, load_weights


class Trap:
    """Unpickling one touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def index_of(folder: Path) -> Any:
    """The index as torch reads it."""
    return pickle.loads((folder / INDEX).read_bytes())


def write_index(folder: Path, index: Any) -> None:
    (folder / INDEX).write_bytes(pickle.dumps(index))
    seal(folder)


def in_index(folder: Path, mark: Path) -> None:
    index = index_of(folder)
    index.planner_data["trap"] = Trap(mark)
    write_index(folder, index)


def in_dotted_name(folder: Path, mark: Path) -> None:
    """A name of an allowed module that leads out of it."""
    words = [b"torch.distributed.checkpoint.metadata", b"os.system", b"touch " + bytes(mark)]
    module, name, command = (b"\x8c" + bytes([len(word)]) + word for word in words)
    (folder / INDEX).write_bytes(b"\x80\x04" + module + name + b"\x93" + command + b"\x85R.")
    seal(folder)


def in_bytes(folder: Path, mark: Path) -> None:
    """A plain value of the optimizer, which torch loads with ``weights_only=False``."""
    index = index_of(folder)
    key = next(k for k in index.storage_data if k.fqn.endswith("weight_decay"))
    place = index.storage_data[key]
    out = BytesIO()
    torch.save(Trap(mark), out)
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(out.getvalue())
    file.write_bytes(file.read_bytes() + out.getvalue())
    write_index(folder, index)


def in_meta(folder: Path, mark: Path) -> None:
    content = torch.load(folder / "meta.pt", weights_only=True)
    torch.save({**content, "trap": Trap(mark)}, folder / "meta.pt")


def in_file(file: Path, mark: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "trap": Trap(mark)}, file)


ENTRANCES: dict[str, Callable[[Path, Path], Any]] = {
    "open_model": lambda path, out: open_model(path),
    "load_weights": lambda path, out: load_weights(open_model(path).model, path),
    "load_optimizer": lambda path, out: moments_of(path),
    "consolidate": consolidate,
    "read_checkpoint": lambda path, out: read_checkpoint(path, "state_dict", "optimizer_states"),
}
COMMANDS: list[list[str]] = [
    ["checkpoint", "inspect", "PATH"],
    ["checkpoint", "consolidate", "PATH", "OUT"],
    ["generate", "--ckpt", "PATH", "--prompt", "a", "--tokenizer", "bytes"],
    ["export", "PATH", "OUT", "--tokenizer", "bytes"],
    ["evaluate", "PATH", "--suite", "perplexity", "--text", "TEXT", "--out", "OUT"],
    ["analyze", "noise", "PATH", "--out", "OUT"],
]


def moments_of(path: Path) -> None:
    model = open_model(path).model.requires_grad_(True)
    load_optimizer_from(model, AdamW().build(model), path)


def test_the_traps_would_work(sharded: Path, single: Path, tmp_path: Path) -> None:
    for number, (source, trap) in enumerate(
        ((sharded, in_index), (sharded, in_bytes), (sharded, in_meta), (single, in_file))
    ):
        mark, path = tmp_path / f"mark{number}", copied(source, tmp_path / str(number))
        trap(path, mark)
        if trap is in_index:
            index_of(path)
        elif trap is in_bytes:
            dcp_to_torch_save(path, tmp_path / "out")
        else:
            torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=False)
        assert mark.exists(), trap


@pytest.mark.parametrize("trap", [in_index, in_dotted_name, in_bytes, in_meta, in_file])
def test_nothing_is_executed(
    trap: Callable[[Path, Path], None], sharded: Path, single: Path, tmp_path: Path, corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mark = tmp_path / "mark"
    path = copied(single if trap is in_file else sharded, tmp_path)
    trap(path, mark)
    for number, enter in enumerate(ENTRANCES.values()):
        reads_moments = enter in (ENTRANCES["load_optimizer"], ENTRANCES["consolidate"])
        if trap is not in_bytes or reads_moments:
            with pytest.raises(InputError, match="not opened"):
                enter(path, tmp_path / f"out{number}")
    text = tmp_path / "text.txt"
    text.write_text("some text of no importance, twice: some text of no importance")
    logs, sizes = (
        tmp_path / "logs",
        {"PATH": str(path), "OUT": str(tmp_path / "o"), "TEXT": str(text)},
    )
    fits = [
        arguments(corpus, logs, "a", ckpt_path=path, trainer__strategy="fsdp2", **STEPS),
        arguments(corpus, logs, "b", init_from=path, **STEPS),
        arguments(corpus, logs, "c", init_from=path, init_optimizer=True, **STEPS),
    ]
    fits.append(["validate", *fits[0][1:]])
    for command in [*COMMANDS, *fits]:
        if trap is in_bytes and command[0] in ("generate", "export", "evaluate", "analyze"):
            continue  # which do not read it
        if trap is in_bytes and command in (fits[1], fits[3]):
            continue
        assert main([sizes.get(word, word) for word in command]) == 2, command
        err = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in " ".join(err)
        assert err[-1].startswith("error: "), err
    assert not mark.exists()


WEIGHT = "network.layers.0.mlp.up_proj.weight"
NETWORK, POSITION = ("hyper_parameters", "network"), ("hyper_parameters", "position")
MOMENTS = ("optimizer_states", 0, "state", 0)


def laughs() -> Any:
    """Nine to the power of nine values, in eighty pieces."""
    value: Any = 0
    for _ in range(9):
        value = [value] * 9
    return value


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ((*NETWORK, "num_layers"), 200_000, "num_layers is 200000; it must be a whole number from"),
        ((*NETWORK, "num_layers"), 1000, "tensor 'layers.2.* is missing"),
        ((*NETWORK, "hidden_size"), 2**40, "hidden_size is 1099511627776; it must be"),
        ((*NETWORK, "hidden_size"), 64, r"embed_tokens.weight' is \(257, 32\); expected"),
        ((*NETWORK, "vocab_size"), -1, "vocab_size is -1"),
        ((*NETWORK, "num_heads"), True, "num_heads is True"),
        ((*NETWORK, "ffn_size"), 48.0, "ffn_size is 48.0"),
        ((*NETWORK, "norm_eps"), float("nan"), "network.norm_eps is no plain finite value"),
        (NETWORK, [1], "must be a mapping"),
        ((*POSITION, "init_args"), {"scaling": 5}, "no attribute 'frequencies'"),
        ((*POSITION, "class_path"), "os.system", "class_path is 'os.system'; allowed"),
        (("hyper_parameters", "x"), laughs(), "more than 100,000 values"),
        (("hyper_parameters",), [[] for _ in range(250_000)], "data.pkl has .* bytes; allowed"),
        (("state_dict",), None, "state_dict is a NoneType, not a dict"),
        (("state_dict", WEIGHT), torch.zeros(1).expand(48, 32), "is no plain tensor of numbers"),
        (("state_dict", WEIGHT), torch.zeros(48, 32, dtype=torch.int64), "is no plain tensor"),
        (("state_dict", WEIGHT), torch.zeros(48, 32, device="meta"), "is no plain tensor"),
        (("state_dict", WEIGHT), torch.zeros(48, 31), r"\(48, 31\); expected \(48, 32\)"),
        (("global_step",), 1.5, "global_step is a float, not a int"),
    ],
)
def test_files_that_ask_for_too_much_or_make_no_sense(
    at: tuple[Any, ...], value: Any, words: str, single: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_model(changed(single, tmp_path / "bad.ckpt", at, value))
    assert "bad.ckpt" in str(caught.value)


def changed(single: Path, out: Path, at: tuple[Any, ...], value: Any) -> Path:
    content = place = torch.load(single, weights_only=True)
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    torch.save(content, out)
    return out


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ((*MOMENTS, "exp_avg"), torch.zeros(3), r"exp_avg of .*embed_tokens.weight' is \(3,\)"),
        ((*MOMENTS, "exp_avg"), torch.zeros(257, 32).to_sparse(), "is "),
        ((*MOMENTS, "exp_avg_sq"), None, "exp_avg_sq of .* is NoneType"),
        ((*MOMENTS, "step"), torch.zeros(7), "step of .*; expected"),
        (("optimizer_states", 0, "param_groups"), [{"params": [0]}], "groups of"),
        (("loops",), {}, "wrong value: 'fit_loop'"),
        (("lr_schedulers",), [5], "incomplete"),
    ],
)
def test_states_that_no_optimizer_could_use(
    at: tuple[Any, ...], value: Any, words: str, single: Path, tmp_path: Path, corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Fused AdamW writes where it was told to: beyond its tensors, if they are too small."""
    bad = changed(single, tmp_path / "bad.ckpt", at, value)
    if at[0] == "optimizer_states":
        with pytest.raises(InputError, match=words):
            moments_of(bad)
    assert main(arguments(corpus, tmp_path, "b", ckpt_path=bad, **STEPS)) == 2
    err = capsys.readouterr().err
    assert re.search(rf"error: .*{words}", err)
    assert "bad.ckpt" in err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[" + "[]," * 8_000_000 + "0]", "bytes, the most"),
        ("config.json", '{"model_type": "ropepp", "network": 5}', "incomplete"),
        ("config.json", '["ropepp"]', "is list; allowed is a JSON object"),
        ("config.json", "[" * 100_000, "is no JSON"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "has no 'weight_map'"),
        (CHECKSUMS, '{"crc32": 5}', "is damaged"),
    ],
)
def test_folders_that_make_no_sense(
    name: str, content: str, words: str, folder: Path, tmp_path: Path
) -> None:
    path = copied(folder, tmp_path)
    (path / CHECKSUMS).unlink()
    (path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        open_model(path)
