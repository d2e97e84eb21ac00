"""Damaged and hostile files of models: refused in one line, or harmless; nothing of them is run."""

import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from helpers.fit_runs import arguments, curve, fit
from helpers.small_models import exported
from ropepp.checksums import CHECKSUMS, Damaged
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop.saved import SavedModel, open_model
from ropepp.runs import shards
from ropepp.runs.checkpoints import consolidate, describe, read_checkpoint
from ropepp.runs.shards import INDEX, read_index, seal
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
            assert str(place) in str(error)
        finally:
            file.write_bytes(before)

    try:
        damage()
    finally:
        shutil.rmtree(whole)
