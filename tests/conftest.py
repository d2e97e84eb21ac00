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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked extra")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "extra: too long for every day; run with --all")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# What takes longest, in this order; then the other files by their number of slow tests.
FIRST = (
    "train/test_process_counts",
    "sweep/test_survival",
    "train/test_strategy",
    "train/test_resume",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, so that no worker is left with one at the end; of the cases of a module
    that need a GPU one is left where there is none, and skipped."""
    if not config.getoption("--all"):
        extra = [item for item in items if "extra" in item.keywords]
        config.hook.pytest_deselected(items=extra)
        items[:] = [item for item in items if "extra" not in item.keywords]

    slow = Counter(item.path for item in items if "slow" in item.keywords)

    def order(item: pytest.Item) -> tuple[int, int]:
        name = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        return FIRST.index(name) if name in FIRST else len(FIRST), -slow[item.path]

    items.sort(key=order)
    if not torch.cuda.is_available():
        cases = Counter(item.path for item in items if "gpu" in item.keywords)
        seen: set[Path] = set()
        for item in [item for item in items if "gpu" in item.keywords]:
            if item.path in seen:
                items.remove(item)
            else:
                seen.add(item.path)
                reason = f"needs a CUDA device, as {cases[item.path]} cases of this module do"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    warm_python.end()


@pytest.fixture
def warm_processes() -> Iterator[None]:
    """Python processes that the code under test starts are forks of a warm one."""
    with warm_python.everywhere():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus of bytes, vocabulary 257, with two documents to validate on."""
    return _prepare_words(tmp_path_factory, 0.1)


@pytest.fixture(scope="session")
def corpus_with_more_validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with seven of its documents there."""
    return _prepare_words(tmp_path_factory, 0.2)


def _prepare_words(tmp_path_factory: pytest.TempPathFactory, fraction: float) -> Path:
    from ropepp.data.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = [f"word{(number * 31 + i * i) % 97}" for i in range(20 + 7 * number)]
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + ".\n")
    out = tmp_path_factory.mktemp("corpora") / "words"
    return prepare(str(folder), str(out), tokenizer="bytes", validation_fraction=fraction)
