"""RULER and BABILong: lengths, answers, seeds, scores; against lm-eval's own generators."""

import ast
import importlib.util
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from ropepp.data.tokenizer import Tokenizer, train_bpe
from ropepp.errors import InputError
from ropepp.eval.babilong import FactQuestions, babilong_tasks
from ropepp.eval.babilong.scoring import LABELS, scores
from ropepp.eval.ruler import ruler_tasks
from ropepp.eval.ruler.background import sentences, speeches
from ropepp.eval.ruler.niah import NEEDLE, NOISE
from ropepp.eval.tasks import Sample, Task, count_tokens

RULER = {task.name: task for task in ruler_tasks(None)}
BABILONG = {task.name: task for task in babilong_tasks(None)}
TASKS = list((RULER | BABILONG).values())
BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(speeches()[:12], 4096)


@BY_NAME
@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_prompts_fill_their_length(task: Task, length: int, tokenizer: Tokenizer) -> None:
    for sample in task.samples(tokenizer, length, 2, seed=1):
        tokens = count_tokens(tokenizer, sample.prompt) + task.max_new_tokens
        assert 0.97 * length <= tokens <= length


@BY_NAME
def test_samples_depend_on_seed_and_index_alone(task: Task, tokenizer: Tokenizer) -> None:
    few, many = (task.samples(tokenizer, 4096, n, seed=3) for n in (2, 4))
    assert few == many[:2]
    assert len({sample.prompt for sample in many}) == 4
    assert task.samples(tokenizer, 4096, 1, seed=4)[0].prompt != few[0].prompt


@BY_NAME
def test_answers_follow_from_the_text_and_score_fully(task: Task, tokenizer: Tokenizer) -> None:
    for sample in task.samples(tokenizer, 4096, 3, seed=0):
        if task.suite == "ruler":
            context = sample.prompt.lower()
            assert all(answer.lower() in context for answer in sample.answers)
        assert task.score(", ".join(sample.answers), sample)["score"] == 1.0
        assert task.score("", sample)["score"] == 0.0


def facts_alone(task: Task, count: int) -> list[Sample]:
    """Samples without a background."""
    assert isinstance(task, FactQuestions)
    return [task.draft(Random(f"{task.name} {index}"), 0, 0) for index in range(count)]


@pytest.mark.parametrize("name", BABILONG)
def test_a_constant_answer_scores_the_baseline(name: str) -> None:
    task = BABILONG[name]
    samples = facts_alone(task, 400)
    common = Counter(sample.answers[0] for sample in samples).most_common(1)[0][0]
    share = sum(task.score(common, sample)["score"] for sample in samples) / len(samples)
    # Labels that the question names are dropped, so that a constant answer may lose some more.
    assert share <= task.baseline + 4 * (task.baseline / len(samples)) ** 0.5
    assert share >= 0.6 * task.baseline


def test_random_labels_score_near_chance() -> None:
    task, rng = BABILONG["qa1"], Random(0)
    samples = facts_alone(task, 600)
    said = [rng.choice(LABELS["qa1"]) for _ in samples]
    share = sum(task.score(t, s)["score"] for t, s in zip(said, samples, strict=True)) / 600
    assert share == pytest.approx(1 / 6, abs=0.06)


def test_needles_are_where_and_as_many_as_stated(tokenizer: Tokenizer) -> None:
    wanted = {"niah_single_1": 1, "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for name, needles in wanted.items():
        (sample,) = RULER[name].samples(tokenizer, 4096, 1, seed=0)
        found = re.findall(
            r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", sample.prompt
        )
        assert len(found) == needles, name
        assert set(sample.answers) <= {value for _, value in found}
    assert "uuids" in RULER["niah_single_3"].samples(tokenizer, 4096, 1, 0)[0].prompt


def test_variables_form_one_chain(tokenizer: Tokenizer) -> None:
    (sample,) = RULER["vt"].samples(tokenizer, 4096, 1, seed=0)
    value = re.search(r"assigned the value (\d+)", sample.prompt.rsplit("Question", 1)[1])[1]
    chain = {re.search(rf"VAR (\w+) = {value}", sample.prompt)[1]}
    for _ in range(4):
        chain |= {
            name for name, of in re.findall(r"VAR (\w+) = VAR (\w+)", sample.prompt) if of in chain
        }
    assert chain == set(sample.answers)


def test_common_and_frequent_words_are_the_most_frequent(tokenizer: Tokenizer) -> None:
    (sample,) = RULER["cwe"].samples(tokenizer, 4096, 1, seed=0)
    listed = re.findall(r"\d+\. (\S+)", sample.prompt.rsplit("Question", 1)[0].split("Below")[2])
    assert {word for word, _ in Counter(listed).most_common(10)} == set(sample.answers)
    (sample,) = RULER["fwe"].samples(tokenizer, 4096, 1, seed=0)
    coded = sample.prompt.split("coded words. ")[1].rsplit("\nQuestion", 1)[0].split()
    assert [word for word, _ in Counter(coded).most_common(4)] == ["...", *sample.answers]


def test_facts_keep_their_order() -> None:
    task = BABILONG["qa2"]
    assert isinstance(task, FactQuestions)
    for seed in range(5):
        facts = task.story(Random(seed)).facts
        hidden = task.draft(Random(seed), 900, 0).prompt
        hidden = hidden[hidden.index("<context>") :]
        for fact in facts:
            assert fact in hidden
            hidden = hidden[hidden.index(fact) + len(fact) :]


def test_rules_of_babilong() -> None:
    where = "Where is Mary?"
    assert scores("qa1", where, "kitchen", "The kitchen. Or the garden")["score"] == 1
    assert scores("qa1", where, "kitchen", "kitchen or garden")["score"] == 0
    before = "Where was the milk before the garden?"
    assert scores("qa3", before, "office", "office, before the garden")["score"] == 1
    none = scores("qa7", "How many objects is Mary carrying?", "none", "none")
    assert none == {"score": 1, "official": 0, "simple": 1}
    assert scores("qa8", "What is Mary carrying?", "apple,milk", "milk and apple")["score"] == 1


@pytest.mark.parametrize("text", [speeches()[0], 'Mr. Adams spoke. "Yes." He left! A B. Cd e?'])
def test_sentences_give_the_text_back(text: str) -> None:
    assert " ".join(sentences(text)) == " ".join(text.split())


def test_given_files_are_used_and_make_tasks_official(tmp_path: Path, tokenizer: Tokenizer) -> None:
    essay = " ".join(f"Sentence number {i} is here." for i in range(50))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    paragraphs = [
        {
            "context": f"Paragraph {i} is about thing{i}. " + "It is long. " * 30,
            "qas": [
                {
                    "question": f"What of {i}?",
                    "answers": [{"text": f"thing{i}"}],
                    "is_impossible": False,
                }
            ],
        }
        for i in range(60)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    tasks = {task.name: task for task in ruler_tasks(tmp_path)}
    assert tasks["niah_single_2"].official
    assert tasks["qa_1"].official
    assert not tasks["qa_2"].official
    (sample,) = tasks["niah_single_2"].samples(tokenizer, 2048, 1, 0)
    assert "Sentence number 7 is here." in sample.prompt
    (sample,) = tasks["qa_1"].samples(tokenizer, 2048, 1, 0)
    assert sample.answers[0] in sample.prompt
    with zipfile.ZipFile(tmp_path / "tasks_1-20_v1-2.zip", "w") as archive:
        lines = "1 Mary moved to the attic.\n2 Where is Mary? \tattic\t1\n"
        for i in range(1, 11):
            archive.writestr(f"tasks_1-20_v1-2/en-10k/qa{i}_x_test.txt", lines)
    task = babilong_tasks(tmp_path)[0]
    assert not task.official  # the books are missing
    assert task.samples(tokenizer, 1024, 1, 0)[0].answers == ("attic",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("PaulGrahamEssays.json", "[]", "is not of the form"),
        ("squad.json", "{", "is no JSON"),
        ("hotpotqa.json", '[{"question": 1}]', "is not of the form of HotpotQA"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}.* {words}"):
        ruler_tasks(tmp_path)


def test_what_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="length is 100; ruler niah_single_1 needs more"):
        RULER["niah_single_1"].samples(tokenizer, 100, 1, 0)


def constants(module: str) -> list[str]:
    """The texts in the source of one of lm-eval's modules, which would download when imported."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ruler"
    tree = ast.parse((folder / f"{module}.py").read_text())
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("niah_multivalue", "niah_utils"),
        ("vt", "vt_utils"),
        ("cwe", "cwe_utils"),
        ("fwe", "fwe_utils"),
    ],
)
def test_templates_are_those_of_lm_eval(name: str, module: str, tokenizer: Tokenizer) -> None:
    (sample,) = RULER[name].samples(tokenizer, 4096, 1, 0)
    (template,) = {text for text in constants(module) if "{context}" in text}
    pieces = [piece.strip() for piece in re.split(r"\{\w+\}", template)]
    assert len(pieces) >= 2
    for piece in pieces:
        assert piece in sample.prompt


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_the_noise_and_needles_are_those_of_lm_eval() -> None:
    noise = {text.strip() for text in constants("prepare_niah") if "grass" in text}
    assert noise == {NOISE}
    needles = {text for text in constants("prepare_niah") if "One of the special" in text}
    assert {re.sub(r"\{\w+\}", "*", text) for text in needles} == {re.sub(r"\{\w+\}", "*", NEEDLE)}
