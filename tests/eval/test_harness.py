"""lm-eval with our model on local files, against lm-eval's own model on the exported folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from helpers import evaluated
from ropepp.errors import InputError
from ropepp.eval.local_data import GROUPS, TASKS
from ropepp.eval.perplexity import Text, evaluate_text
from ropepp.eval.scores import Score
from ropepp.model.positions import RoPE, RoPEppEC
from ropepp.model.transformer import Transformer

pytest.importorskip("lm_eval")
ITEMS = 24


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(cache))
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return evaluated.make_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    evaluated.write_benchmarks(folder, ITEMS)
    return folder


@dataclass(frozen=True)
class Pair:
    """A model of ours, and lm-eval's `hf` model on the folder that `ropepp export` makes of it."""

    model: Transformer
    reference: Any


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(RoPE(), id="RoPE", marks=pytest.mark.extra),
        pytest.param(RoPEppEC(), id="EC"),
    ],
)
def pair(request: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from lm_eval.models.huggingface import HFLM

    path = tmp_path_factory.mktemp("pair") / "exported"
    evaluated.write_folder(path, tokenizer, position=request.param)
    # Any program's Llama: transformers' own implementation is what we agree with.
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
    reference = HFLM(pretrained=str(path), dtype="float32", batch_size=8, device="cpu")
    return Pair(evaluated.make_model(tokenizer.vocab_size, request.param), reference)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_runs_offline_and_agrees_with_lm_evals_own_model(
    name: str, data: Path, tokenizer: Any, pair: Pair, tmp_path: Path
) -> None:
    from ropepp.eval.harness import evaluate_harness, run_harness

    subject = evaluated.make_subject(tmp_path, pair.model, tokenizer)
    rows = evaluate_harness(subject, name, data)
    expected = run_harness(pair.reference, name, data)
    assert expected
    assert [row.metric for row in rows] == list(expected)
    for row in rows:
        values = expected[row.metric]
        assert row.n == len(values) == ITEMS
        assert row.value == pytest.approx(sum(values) / ITEMS, abs=1e-5)
        error = torch.tensor(values, dtype=torch.float64).std() / ITEMS**0.5
        assert row.stderr == pytest.approx(error.item(), abs=1e-5)
    if name != "truthfulqa_mc2":  # whose scores are probabilities
        assert 0 < rows[0].value < 1, "all right or all wrong would hide a difference"


def test_log_likelihoods_are_those_of_our_own_decoding(
    tokenizer: Any, pair: Pair, tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance

    from ropepp.eval.harness import harness_model

    rng = Random(1)
    texts = [("", " ban")]
    for n in (1, 3, 9):
        context = evaluated.sentence(rng, n)
        texts += [(context, f" {evaluated.sentence(rng, k)}") for k in (1, 2, 5)]
    requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    ours = harness_model(evaluated.make_subject(tmp_path, pair.model, tokenizer))
    own = []
    for text in texts:
        context, ids = tokenizer.encode_batch(list(text))
        row = torch.tensor([[tokenizer.bos_id, *context, *ids]])
        logits = pair.model(row)[0, -len(ids) - 1 : -1].log_softmax(-1)
        likelihood = logits.gather(1, row[0, -len(ids) :, None]).sum().item()
        own.append((likelihood, logits.argmax(-1).tolist() == ids))
    for lm in (ours, pair.reference):
        found = lm.loglikelihood(requests, disable_tqdm=True)
        assert [x for x, _ in found] == pytest.approx([x for x, _ in own], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in own]


def test_a_task_that_was_measured_is_not_measured_again(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ropepp.eval import harness

    model = evaluated.make_model(tokenizer.vocab_size)
    first = harness.evaluate_harness(
        evaluated.make_subject(tmp_path, model, tokenizer), "piqa", data, 5
    )
    monkeypatch.setattr(harness, "harness_model", lambda _: pytest.fail("measured again"))
    again = evaluated.make_subject(tmp_path, model, tokenizer)
    assert harness.evaluate_harness(again, "piqa", data, 5) == first
    with pytest.raises(pytest.fail.Exception):
        harness.evaluate_harness(again, "piqa", data, 4)


def test_perplexity_per_word_is_lm_evals_of_the_same_file(
    tokenizer: Any, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    text = evaluated.sentence(Random(3), 120) + "\n\n" + evaluated.sentence(Random(4), 30)
    evaluated.write_lines(tmp_path / "page.jsonl", [{"page": text}])
    own = Path(lm_eval.tasks.__file__).parent / "wikitext" / "wikitext.yaml"
    (tmp_path / "page.yaml").write_text(
        f"include: {own}\ntask: page\ndataset_path: json\ndataset_name: null\n"
        "training_split: null\nvalidation_split: null\ntest_split: test\nnum_fewshot: 0\n"
        f"dataset_kwargs: {{data_files: {{test: [{tmp_path / 'page.jsonl'}]}}}}\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    subject = evaluated.make_subject(tmp_path, pair.model, tokenizer)
    rows = {row.metric: row.value for row in evaluate_text(subject, Text("t", text), 4000, 9)[0]}
    # Its own model scores BOS behind BOS where the tokenizer adds one.
    monkeypatch.setattr(pair.reference, "add_bos_token", False)
    found = evaluate(pair.reference, tasks.load(["page"]), bootstrap_iters=0)["results"]["page"]
    assert rows["per word"] == pytest.approx(found["word_perplexity,none"], rel=1e-5)
    assert rows["bits per byte"] == pytest.approx(found["bits_per_byte,none"], rel=1e-5)


def test_groups_are_means_and_need_all_their_tasks() -> None:
    from ropepp.eval.harness import summarize

    def row(task: str, metric: str, value: float) -> Score:
        return Score("m", "short", task, None, metric, value, 0.1, 10)

    rows = [
        r
        for i, task in enumerate(TASKS)
        for r in (row(task, "acc", i / 20), row(task, "acc_norm", 1.0))
    ]
    out = {r.task: r for r in summarize(rows)}
    assert list(out) == ["truthfulqa", "super-glue-lm-eval-v1", "average of 9"]
    value = {task: i / 20 for i, task in enumerate(TASKS)}
    groups = [sum(value[t] for t in tasks) / len(tasks) for tasks in GROUPS.values()]
    assert out["average of 9"].value == pytest.approx(sum(groups) / 9)
    assert out["truthfulqa"].stderr == pytest.approx(0.1 * 2**0.5 / 2)
    partial = summarize([r for r in rows if r.task != "wic"])
    assert [r.task for r in partial] == ["truthfulqa"]


def test_doubled_heads_run_too(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    from ropepp.eval.harness import evaluate_harness

    model = evaluated.make_model(tokenizer.vocab_size, RoPEppEC())
    rows = evaluate_harness(evaluated.make_subject(tmp_path, model, tokenizer), "piqa", data, 5)
    assert rows[0].n == 5


def test_odd_paths_and_a_cache_that_cannot_be_written(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are patterns, and chains of protocols, to the library that reads the files."""
    import datasets

    from ropepp.eval.harness import evaluate_harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    odd = tmp_path / "ed [v1]*?::{a}"
    subject = evaluated.make_subject(
        tmp_path, evaluated.make_model(tokenizer.vocab_size), tokenizer
    )
    file = TASKS["piqa"].file(odd)
    row = {"goal": "en", "sol1": "to\u2028", "sol2": "tre", "label": 0}
    file.parent.mkdir(parents=True)
    line = json.dumps(row, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + (line + "\r\n\n" + line).encode())
    found = evaluate_harness(subject, "piqa", odd)
    assert {score.n for score in found} == {2}
    file.write_text(f"{line}\n{line[:-3]}\n")
    with pytest.raises(InputError, match=r"piqa/validation\.jsonl, line 2: malformed JSON"):
        evaluate_harness(subject, "piqa", odd)
