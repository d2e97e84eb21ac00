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

from helpers.ruler_files import write_ruler_files
from ropepp.data.tokenizer import BytesTokenizer, Tokenizer, train_bpe
from ropepp.errors import InputError
from ropepp.eval.babilong import FactQuestions, babilong_tasks
from ropepp.eval.babilong.scoring import LABELS, scores
from ropepp.eval.generated import tasks_of
from ropepp.eval.ruler import ruler_tasks
from ropepp.eval.ruler.background import sentences, speeches
from ropepp.eval.ruler.base import OPENCOMPASS, PROMPTS
from ropepp.eval.tasks import Sample, Task
from ropepp.generate.text import document_ids

RULER = {task.name: task for task in ruler_tasks(None)}
BABILONG = {task.name: task for task in babilong_tasks(None)}
TASKS = list((RULER | BABILONG).values())
BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(speeches()[:12], 4096)


@BY_NAME
@pytest.mark.parametrize("length", [4096, 8192, pytest.param(32768, marks=pytest.mark.extra)])
def test_prompts_fill_their_length(task: Task, length: int, tokenizer: Tokenizer) -> None:
    # Those of RULER may be some steps shorter, see test_ruler_structure.
    least = 0.97 if task.suite == "babilong" else 0.5
    for sample in task.samples(tokenizer, length, 2, seed=1):
        tokens = len(document_ids(tokenizer, sample.prompt)) + task.max_new_tokens
        assert least * length <= tokens <= length


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
    return [task.draft(Random(f"{task.name} {index}"), 0) for index in range(count)]


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
        facts = Random(seed).choice(task.stories).facts
        hidden = task.draft(Random(seed), 900).prompt
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


def test_rulers_files_are_used_and_make_tasks_official(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_ruler_files(tmp_path)
    tasks = {task.name: task for task in ruler_tasks(tmp_path)}
    assert all(task.official for task in tasks.values())
    essay = json.loads((tmp_path / "PaulGrahamEssays.json").read_text())["text"]
    (sample,) = tasks["niah_single_2"].samples(tokenizer, 2048, 1, 0)
    assert " ".join(essay.split()[:12]) in sample.prompt
    squad = json.loads((tmp_path / "squad.json").read_text())["data"]
    asked = [
        (qa["question"], tuple(a["text"] for a in qa["answers"]), paragraph["context"])
        for article in squad
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        if not qa["is_impossible"]
    ]
    near = {p["context"] for p in squad[0]["paragraphs"]}
    for sample, (question, answers, context) in zip(
        tasks["qa_1"].samples(tokenizer, 4096, 5, 0), asked, strict=False
    ):  # the first questions, in order
        assert sample.prompt.endswith(f"Question: {question} Answer:")
        assert sample.answers == answers
        told = re.split(r"\n*Document \d+:\n", sample.prompt.rsplit("\n\nAnswer the", 1)[0])[1:]
        assert context in told
        assert len(set(told)) == len(told)
        assert set(told) <= near  # documents of its article come before any others
    rows = json.loads((tmp_path / "hotpotqa.json").read_text())
    for sample, row in zip(tasks["qa_2"].samples(tokenizer, 8192, 5, 0), rows, strict=False):
        assert row["question"] in sample.prompt
        assert sample.answers == (row["answer"],)
        for title, sentences_of_it in row["context"]:
            assert f"{title}\n{''.join(sentences_of_it)}" in sample.prompt
    with pytest.raises(InputError, match="41 samples are asked of ruler qa_2, which has 40"):
        tasks["qa_2"].samples(tokenizer, 8192, 41, 0)
    with pytest.raises(InputError, match=r"only 0 questions of ruler qa_2 fit"):
        tasks["qa_2"].samples(tokenizer, 512, 1, 0)


class Narrow(BytesTokenizer):
    """One token a word: a length that wonderwords do not fill is short of text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[0] * len(text.split()) for text in texts]


@pytest.mark.extra
def test_common_words_say_how_far_they_reach() -> None:
    length = 120_000
    with pytest.raises(InputError, match=r"length is 120000; ruler cwe reaches \d+ tokens"):
        RULER["cwe"].samples(Narrow(), length, 1, 0)
    shorter = ruler_tasks(None, OPENCOMPASS)[9].samples(Narrow(), length, 1, 0)[0]
    assert len(shorter.prompt.split()) < length


STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra took the milk there.
2 Sandra handed the milk to John.
3 What is Sandra carrying? \tapple,milk\t1 2
"""


def test_babis_files_are_read_as_they_are_published(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = {
        f"tasks_1-20_v1-2/{part}/qa{i}_some-task_{split}.txt": STORY if good else "1 Not it.\n"
        for part in ("en", "en-10k")
        for i in range(1, 21)
        for split in ("train", "test")
        for good in [(part, split) == ("en-10k", "test")]
    }
    with zipfile.ZipFile(tmp_path / "tasks_1-20_v1-2.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    task = babilong_tasks(tmp_path)[0]
    assert not task.official  # the books are missing
    found = {sample.question: sample for sample in task.samples(tokenizer, 1024, 30, 0)}
    assert set(found) == {"Where is Mary?", "Where is Daniel?", "What is Sandra carrying?"}
    second = found["Where is Daniel?"]
    assert second.answers == ("hallway",)
    context = second.prompt.split("<context>")[-1]
    facts = [line.partition(" ")[2] for line in STORY.split("\n")[:4] if "\t" not in line]
    places = [context.index(fact) for fact in facts]
    assert places == sorted(places)
    assert "Sandra" not in context
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / "1.txt").write_text("This is a sentence of ten words or so here. " * 400)
    assert all(task.official for task in babilong_tasks(tmp_path))


def test_babilongs_own_samples_are_taken_in_their_order(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [
        {"input": f"Fact {i}. Mary is here. ", "question": "Where is Mary? ", "target": "office"}
        for i in range(3)
    ]
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_text(json.dumps(rows))
    task, other = babilong_tasks(tmp_path)[:2]
    assert (task.official, other.official) == (True, False)
    first, second = task.samples(tokenizer, 4096, 2, seed=5)
    end = "\n\n<context>\nFact 0. Mary is here.\n</context>\n\nQuestion: Where is Mary? "
    assert first.prompt.endswith(end)
    assert "Fact 1." in second.prompt
    assert task.score("the office", first)["score"] == 1
    with pytest.raises(InputError, match=r"4 samples are asked of .*qa1, which has 3"):
        task.samples(tokenizer, 4096, 4, 0)
    with pytest.raises(InputError, match=r"length is 8192; .*qa1 has other files alone: 4k\.json"):
        task.samples(tokenizer, 8192, 1, 0)
    (tmp_path / "qa1" / "8k.json").write_text('[{"input": "a"}]')
    with pytest.raises(InputError, match=r"8k\.json is no list of objects with input, question"):
        task.samples(tokenizer, 8192, 1, 0)


def test_the_papers_protocol(tokenizer: Tokenizer) -> None:
    for suite, names in (("ruler", RULER), ("babilong", BABILONG)):
        tasks = {task.name: task for task in tasks_of(suite, None, "paper")}
        assert list(tasks) == list(names)
        for task in tasks.values():
            assert (task.max_new_tokens, task.suite) == (64, f"{suite}, paper")
            assert task.samples(tokenizer, 4096, 1, 0)[0].prompt.endswith("\n\n")
        assert [task.name for task in tasks_of(suite, None, "official")] == list(names)
    (sample,) = tasks_of("ruler", None, "paper")[8].samples(tokenizer, 4096, 1, 0)
    assert sample.prompt.count("Memorize and track") == 1  # no example
    assert sample.prompt.endswith("variables are assigned the value "
        f"{sample.prompt.split('assigned the value ')[1][:5]}, they are: \n\n")  # fmt: skip
    task = next(task for task in tasks_of("babilong", None, "paper") if task.name == "qa1")
    (sample,) = task.samples(tokenizer, 2048, 1, 0)
    right = sample.answers[0]
    assert task.score(f"{right} or garden or office", sample) == {"score": 1}
    assert task.score(f"No. {right}", sample) == {"score": 0}


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
    assert noise == {PROMPTS["noise"]}
    needles = {text for text in constants("prepare_niah") if "One of the special" in text}
    ours = re.sub(r"\{\w+\}", "*", PROMPTS["needle"])
    assert {re.sub(r"\{\w+\}", "*", text) for text in needles} == {ours}
