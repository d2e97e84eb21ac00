"""One thread a process: the suite runs in several, and two that spin for the same cores crawl."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "1000"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import warm_python

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, so that no worker is left with one at the end."""
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path])


def pytest_sessionfinish() -> None:
    warm_python.end()


@pytest.fixture
def warm_processes() -> Iterator[None]:
    """Python processes that the code under test starts are forks of a warm one."""
    with warm_python.everywhere():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus of bytes, vocabulary 257."""
    from ropepp.data.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = [f"word{(number * 31 + i * i) % 97}" for i in range(20 + 7 * number)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + ".\n")
    out = tmp_path_factory.mktemp("corpora") / "words"
    return prepare(str(folder), str(out), tokenizer="bytes", validation_fraction=0.2)
