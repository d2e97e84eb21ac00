"""Damaged and hostile files of models: refused in one line, or harmless; nothing of them is run."""

import pickle
import shutil
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from helpers.fit_runs import arguments, fit
from helpers.small_models import exported
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop.saved import SavedModel, open_model
from ropepp.runs.checkpoints import consolidate, read_checkpoint
from ropepp.runs.shards import INDEX, seal
from ropepp.train.optim import AdamW
from ropepp.train.weights import load_optimizer_from, load_weights

STEPS = {"trainer__max_steps": 4, "checkpoint__every_n_steps": 2, "checkpoint__keep": 0}
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "first", **STEPS)


@pytest.fixture(scope="module")
def saved(run: Path) -> SavedModel:
    return open_model(run)


@pytest.fixture(scope="module")
def logits(saved: SavedModel) -> torch.Tensor:
    return saved.model(IDS)


@pytest.fixture(scope="module")
def single(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    return Path(shutil.copy(run / "checkpoints" / "step-0000004.ckpt", folder))


@pytest.fixture(scope="module")
def sharded(single: Path, saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as FSDP2 writes it, with the optimizer's state, which has plain values too."""
    return write_sharded(single, saved, tmp_path_factory.mktemp("sharded") / "step-0000004.ckpt")


@pytest.fixture(scope="module")
def folder(saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(saved.model, tmp_path_factory.mktemp("exported") / "out", shard_bytes=60_000)


def write_sharded(single: Path, saved: SavedModel, out: Path) -> Path:
    content = torch.load(single, weights_only=True)
    tensors = content.pop("state_dict")
    model = open_model(single).model.requires_grad_(True)
    optimizer = AdamW().build(model)
    optimizer.load_state_dict(content.pop("optimizer_states")[0])
    moments = get_optimizer_state_dict(model, optimizer)
    dcp.save({"state_dict": tensors, "optimizer_0": moments}, checkpoint_id=out, no_dist=True)
    torch.save(content, out / "meta.pt")
    seal(out)
    return out


def use(path: Path) -> torch.Tensor:
    """All that a checkpoint or folder is read for."""
    model = open_model(path).model
    if not (path / "config.json").exists():
        again = open_model(path).model.requires_grad_(True)
        load_optimizer_from(again, AdamW().build(again), path)
    return model(IDS)


@pytest.mark.parametrize("kind", ["single", "sharded", "folder"])
def test_a_flipped_bit_is_found_or_harmless(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, logits: torch.Tensor
) -> None:
    source: Path = request.getfixturevalue(kind)
    whole = source.parent / "scratch"
    shutil.copytree(source.parent, whole)
    place = whole / source.name
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix != ".md")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(use(place), logits)

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(files), st.floats(0, 1), st.integers(0, 7), st.booleans())
    def damage(file: Path, share: float, bit: int, cut: bool) -> None:
        before = file.read_bytes()
        after = bytearray(before)
        at = min(int(share * len(after)), len(after) - 1)
        after[at] ^= 1 << bit
        file.write_bytes(before[:at] if cut else after)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert torch.equal(use(place), logits)
        except InputError as error:
            assert str(place) in str(error)  # noqa: PT017 (it may be harmless)
        finally:
            file.write_bytes(before)

    try:
        damage()
    finally:
        shutil.rmtree(whole)


class Trap:
    """Unpickling one touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def copied(source: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy" / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path((shutil.copytree if source.is_dir() else shutil.copy2)(source, target))


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
