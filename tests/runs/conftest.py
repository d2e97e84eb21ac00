"""A run, and its last checkpoint in every form, for all tests of a process; they are copied before
they are damaged."""

import shutil
from pathlib import Path

import pytest

from helpers.fit_runs import fit
from helpers.saved_forms import STEPS, write_sharded
from helpers.small_models import exported
from ropepp.interop.saved import SavedModel, open_model


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(corpus, tmp_path_factory.mktemp("logs"), "first", **STEPS)


@pytest.fixture(scope="session")
def saved(run: Path) -> SavedModel:
    return open_model(run)


@pytest.fixture(scope="session")
def single(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    return Path(shutil.copy(run / "checkpoints" / "step-0000004.ckpt", folder))


@pytest.fixture(scope="session")
def sharded(single: Path, saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as FSDP2 writes it, with the optimizer's state, which has plain values too."""
    return write_sharded(single, saved, tmp_path_factory.mktemp("sharded") / "step-0000004.ckpt")


@pytest.fixture(scope="session")
def folder(saved: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(saved.model, tmp_path_factory.mktemp("exported") / "out", shard_bytes=60_000)
