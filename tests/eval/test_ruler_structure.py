"""The six tasks of RULER that lm-eval makes without network: its samples and ours, side by side."""

import importlib
import random
import re
from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from ropepp.eval.ruler import ruler_tasks

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

RULER = {task.name: task for task in ruler_tasks(None)}
LENGTH = 4096
# name -> arguments of lm-eval's task file
NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", "type_needle_k": "words"},
    "niah_multikey_2": {"type_haystack": "needle", "type_needle_k": "words"},
    "niah_multikey_3": {
        "type_haystack": "needle",
        "type_needle_k": "uuids",
        "type_needle_v": "uuids",
    },
}
NAME = {
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}": "UUID",
    r"\b\d{7}\b": "NUMBER",
    r"(?<=for )[^ ]+-[^?\n]+?(?= mentioned| is:)": "KEY",
}


def tokens(text: str) -> Any:
    """About as many as a large vocabulary has, which knows words but not drawn letters."""
    return SimpleNamespace(input_ids=re.findall(r"[A-Z]{2}|\d{1,3}|\w+|[^\w\s]", text))


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of lm-eval's RULER, which would download a splitter of sentences."""
    import nltk
    import numpy as np

    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    random.seed(0)
    np.random.seed(0)
    return lambda name: importlib.import_module(f"lm_eval.tasks.ruler.{name}")


def structure(text: str, word: str = r"\S+") -> list[tuple[Counter[int], Counter[str]]]:
    """For a solved example and the problem: numbers of words said so often, and white space."""
    parts = [part for part in re.split(r"(?=Below is a|Memorize and)", text) if part]
    return [
        (Counter(Counter(re.findall(word, part)).values()), Counter(re.findall(r"\s", part)))
        for part in parts
    ]


def lines(text: str) -> Counter[str]:
    """Lines with what was drawn replaced by its kind."""
    for pattern, name in NAME.items():
        text = re.sub(pattern, name, text)
    return Counter(text.split("\n"))


@pytest.mark.parametrize("name", NEEDLES)
def test_needles(name: str, theirs: Any) -> None:
    module, prepare = theirs("niah_utils"), theirs("prepare_niah")
    settings = {"type_needle_v": "numbers", **NEEDLES[name]}
    (sample,) = prepare.generate_samples(
        prepare.get_haystack(settings["type_haystack"]),
        tokens,
        max_seq_length=LENGTH,
        template=module.TEMPLATE,
        num_samples=1,
        **settings,
    )
    text = f"{sample['input']} {sample['gen_prefix']}"
    size = text.count("\n") - 2  # without the needle
    ours = RULER[name].draft(Random(0), size, LENGTH)
    assert lines(ours.prompt) == lines(text)
    assert lines("\n".join(ours.answers)) == lines("\n".join(sample["outputs"]))


def test_variable_tracking(theirs: Any) -> None:
    (sample,) = theirs("vt_utils").sys_vartrack_w_noise_random(
        tokens,
        num_samples=1,
        max_seq_length=LENGTH,
        icl_example=theirs("vt_utils").sys_vartrack_w_noise_random(tokens, 1, 500, 5)[0],
    )
    text = f"{sample['input']} {sample['gen_prefix']}"
    size = text.rpartition("Memorize and track")[2].count("The grass is green.")
    ours = RULER["vt"].draft(Random(0), size, LENGTH)
    assert structure(ours.prompt) == structure(text)
    shape = [len(name) for name in sample["outputs"]]
    assert [len(name) for name in ours.answers] == shape


@pytest.mark.parametrize("length", [2048, LENGTH])
def test_common_words(length: int, theirs: Any) -> None:
    (sample,) = theirs("cwe_utils").sys_word_pair_random(1, length, tokens)
    text = f"{sample['input_example']}\n{sample['input']} {sample['gen_prefix']}"
    listed = r"(?<=\d\. )\S+"
    size = len(set(re.findall(listed, sample["input"])))
    ours = RULER["cwe"].draft(Random(0), size, length)
    assert structure(ours.prompt, listed) == structure(text, listed)
    assert len(ours.answers) == len(sample["outputs"])


def test_frequent_words(theirs: Any) -> None:
    module, size = theirs("fwe_utils"), 1500
    text, answers, _ = module.generate_input_output(
        10**9, tokens, num_words=size, vocab_size=LENGTH // 50
    )
    ours = RULER["fwe"].draft(Random(0), size, LENGTH)
    assert structure(ours.prompt) == structure(text)
    counts = [Counter(prompt.split()) for prompt in (ours.prompt, text)]
    said = [[c[w] for w in ws] for c, ws in zip(counts, (ours.answers, answers), strict=True)]
    assert said[0] == said[1]
