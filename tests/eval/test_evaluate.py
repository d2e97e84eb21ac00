"""The command: generated tasks, tables, what is left out, going on after a kill."""

import csv
import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers
import torch

from helpers import evaluated
from ropepp.commands.evaluate import main
from ropepp.data.tokenizer import BpeTokenizer, BytesTokenizer, Tokenizer
from ropepp.errors import InputError
from ropepp.eval.evaluate import _to_tensorboard
from ropepp.eval.evaluated_model import ResultCache
from ropepp.eval.generated import encoded_samples, evaluate_task
from ropepp.eval.likelihood import score_continuations
from ropepp.eval.perplexity import Text, evaluate_text
from ropepp.eval.scores import NLL, Score, markdown
from ropepp.eval.tasks import Sample, Task
from ropepp.interop.saved import SavedModel
from ropepp.model.positions import ALiBi, FoPE, RoPE, RoPEppEC, RoPEppEH
from ropepp.model.transformer import Transformer


class Repeat(Task):
    """Texts of different lengths; the score is the share of the expected strings found."""

    suite = "ruler"

    def __init__(self, name: str = "repeat", official: bool = True, new_tokens: int = 6) -> None:
        self.name, self.official, self.max_new_tokens, self.baseline = (
            name,
            official,
            new_tokens,
            0.25,
        )

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        if length < 16:
            raise InputError(f"length is {length}; {self.name} needs 16")
        out = []
        for index in range(count):
            rng = Random(f"{self.name} {seed} {index}")
            prompt = evaluated.sentence(rng, rng.randint(1, length // 4)) + ": "[: index % 3]
            answers = tuple(
                evaluated.sentence(rng, rng.randint(1, 2)) for _ in range(index % 4 + 1)
            )
            out.append(Sample(prompt, answers))
        return out

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        letters = set(output)
        return {
            "score": sum(answer[0] in letters for answer in sample.answers) / len(sample.answers),
            "long": float(len(output) > 8),
        }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return evaluated.make_tokenizer()


def greedy(model: Transformer, ids: list[int], n: int, end: int) -> list[int]:
    new: list[int] = []
    for _ in range(n):
        token = int(model(torch.tensor([ids + new]))[0, -1].argmax())
        if token == end:
            break
        new.append(token)
    return new


def continuation_nll(model: Transformer, context: list[int], ids: list[int]) -> float:
    logits = model(torch.tensor([context + ids]))[0].double().log_softmax(-1)
    start = len(context) - 1
    return -sum(logits[start + i, token].item() for i, token in enumerate(ids))


@pytest.mark.parametrize("batch_tokens", [1, 90, 5000])
@pytest.mark.parametrize("position", [RoPE(), RoPEppEC(), RoPEppEH(), ALiBi(), FoPE(max_length=64)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
def test_answers_and_their_likelihood_agree_with_plain_passes(
    position: Any, batch_tokens: int, tokenizer: Any, tmp_path: Path
) -> None:
    model = evaluated.make_model(tokenizer.vocab_size, position)
    subject = evaluated.make_subject(tmp_path, model, tokenizer, batch_tokens)
    task = Repeat()
    rows = {row.metric: row for row in evaluate_task(subject, task, 40, 7, seed=3)}
    scores, total, tokens, outputs = [], 0.0, 0, []
    for sample in task.samples(tokenizer, 40, 7, 3):
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([sample.prompt])[0]]
        output = tokenizer.decode(greedy(model, ids, task.max_new_tokens, tokenizer.eot_id))
        outputs.append(output)
        scores.append(task.score(output, sample))
        for answer in sample.answers:
            gap = "" if sample.prompt.endswith(" ") else " "
            own = tokenizer.encode_batch([gap + answer])[0]
            total += continuation_nll(model, ids, own)
            tokens += len(own)
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [line["value"]["output"] for line in sorted(lines, key=lambda x: x["index"])] == outputs
    for metric in ("score", "long"):
        values = torch.tensor([score[metric] for score in scores]).double()
        assert rows[metric].value == pytest.approx(values.mean().item())
        assert rows[metric].stderr == pytest.approx(values.std().item() / 7**0.5)
    assert rows[NLL].value == pytest.approx(total / tokens, rel=1e-4)
    assert (rows["score"].baseline, rows["long"].baseline, rows["score"].n) == (0.25, None, 7)


def test_an_answer_ends_at_end_of_text(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    model = evaluated.make_model(tokenizer.vocab_size)
    new = greedy(model, list(b"abc"), 5, tokenizer.eot_id)
    assert len(set(new)) > 1, "the third token must be a new one"
    cut = next(i for i in range(1, 5) if new[i] not in new[:i])
    tokenizer.eot_id = new[cut]
    task = Repeat(new_tokens=5)
    sample = Sample("abc", ("x",))
    task.samples = lambda *args: [sample]  # type: ignore[method-assign]
    evaluate_task(evaluated.make_subject(tmp_path, model, tokenizer), task, 8, 1, 0)
    line = json.loads((tmp_path / "items.jsonl").read_text())
    assert line["value"]["output"] == tokenizer.decode(new[:cut])


def test_a_context_is_read_once_for_all_its_continuations(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = evaluated.make_model(tokenizer.vocab_size)
    read: list[int] = []
    hidden = model.hidden

    def counting(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        read.append(ids.numel())
        return hidden(ids, *args)

    monkeypatch.setattr(model, "hidden", counting)
    context, own = list(range(5, 55)), [[7], [8, 9], [10, 11, 12]]
    found = score_continuations(model, context, own, 10_000)
    assert read == [49, 9]
    monkeypatch.undo()
    for one, ids in zip(found, own, strict=True):
        assert one == pytest.approx(continuation_nll(model, context, ids), rel=1e-5)


# The whole command.


@pytest.fixture
def command(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments: two models, a text, two fake tasks at two lengths."""
    models = [evaluated.write_folder(tmp_path / f"m{seed}", tokenizer, seed) for seed in (0, 1)]
    (tmp_path / "story.txt").write_text(evaluated.sentence(Random(6), 60))
    tasks = [Repeat(), Repeat("again", official=False)]
    monkeypatch.setattr("ropepp.eval.generated.ruler_tasks", lambda data, edition: tasks)
    return [
        *map(str, models),
        *("--suite", "perplexity", "ruler", "--text", str(tmp_path / "story.txt")),
        *("--lengths", "24", "48", "--samples", "5", "--batch_tokens", "100", "--device", "cpu"),
    ]


TABLES = ("evaluation.md", "evaluation.csv", "evaluation.json")


def test_tables_show_all_models_and_mark_substitutes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*command, "--out", str(out)])
    text = (out / "evaluation.md").read_text()
    assert capsys.readouterr().out == text
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    # 2 models x (1 text x 2 windows x 4 + 2 lengths x (2 tasks + their average) x 3 metrics)
    assert len(rows) == 2 * (8 + 18)
    content = json.loads((out / "evaluation.json").read_text())
    assert [row["value"] for row in content["results"]] == [float(row["value"]) for row in rows]
    assert {c["length"] for c in content["loss_by_position"]} == {24, 48}
    assert content["models"]["m1"]["variant"] == "RoPE"
    line = next(x for x in text.splitlines() if x.startswith("| again \\* | 24 | score |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    own = [r for r in rows if (r["task"], r["length"], r["metric"]) == ("again", "24", "score")]
    assert cells[3:5] == ["5", "25.0"]
    assert cells[5:] == [
        f"{100 * float(r['value']):.1f} ± {100 * float(r['stderr']):.1f}" for r in own
    ]
    assert [r["official"] for r in own] == ["False", "False"]
    assert "| repeat | 24 | score |" in text
    assert "no official score" in text


def test_a_killed_evaluation_goes_on_without_repeating(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    added: list[str] = []
    plain_add = ResultCache.add

    def add(self: ResultCache, entries: Any, most: float = math.inf) -> None:
        if len(added) >= most:
            raise KeyboardInterrupt
        entries = list(entries)
        added.append(str([(e["model"], e["task"], e["length"], e["index"]) for e in entries]))
        plain_add(self, entries)

    monkeypatch.setattr(ResultCache, "add", add)
    main([*command, "--out", str(whole)])
    batches = list(added)
    assert len(set(batches)) == len(batches) > 20
    added.clear()
    monkeypatch.setattr(ResultCache, "add", lambda self, entries: add(self, entries, 13))
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(killed)])
    items = killed / "items.jsonl"
    # The kill tears the last of what it wrote: its batch has to run again, as a whole.
    items.write_text(items.read_text()[:-9])
    assert added == batches[:13]
    added.clear()
    monkeypatch.setattr(ResultCache, "add", add)
    main([*command, "--out", str(killed)])
    assert added == batches[12:]
    for name in TABLES:
        assert (killed / name).read_text() == (whole / name).read_text()
    added.clear()
    main([*command, "--out", str(killed)])
    assert added == []
    # Other weights, other numbers: nothing of the first model is found again.
    evaluated.write_folder(tmp_path / "new", evaluated.make_tokenizer(), seed=2)
    weights = (tmp_path / "new" / "model.safetensors").read_bytes()
    (tmp_path / "m0" / "model.safetensors").write_bytes(weights)
    (tmp_path / "m0" / "checksums.json").unlink()  # it was changed on purpose
    main([*command, "--out", str(killed)])
    assert added == [batch for batch in batches if "'m0'" in batch]


def test_what_cannot_run_is_named_and_the_rest_runs(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "data"
    evaluated.write_lines(data / "wikitext" / "validation.jsonl", [{"text": "en to tre"}])
    evaluated.write_lines(data / "piqa" / "validation.jsonl", [{"goal": "a", "sol1": "b"}])
    command[command.index("ruler")] = "short"
    main([command[0], *command[2:], "--data", str(data), "--out", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert f"left out: lambada: {data / 'lambada' / 'test.jsonl'} is missing" in errors
    assert f"left out: wic: {data / 'super_glue' / 'wic' / 'validation.jsonl'} is missing" in errors
    assert "piqa/validation.jsonl, line 1 has no sol2, label" in errors
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| wikitext | 24 |" in text
    assert "left out: hellaswag" in text


def test_a_length_that_is_too_short_leaves_its_task_out(command: list[str], tmp_path: Path) -> None:
    main([*command, "--lengths", "12", "24", "--tasks", "again", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "left out: ruler again 12: length is 12; again needs 16" in text
    assert "| again \\* | 24 |" in text
    assert "repeat" not in text
    assert "story" not in text


def test_bad_options_are_refused_before_any_work(command: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for extra, message in (
        (["--data", str(tmp_path / "none")], "--data is .*none"),
        (["--stride", "24"], "--lengths is .24, 48., --stride 24"),
        (["--tasks", "nothing"], "--tasks has nothing; allowed: again, repeat, story"),
        (["--text", str(tmp_path / "none.txt")], "none.txt is missing"),
        (["--tokenizer", "none"], "tokenizer is 'none'"),
        (["--suite", "short"], "nothing is left to evaluate"),
    ):
        with pytest.raises(InputError, match=message):
            main([*command, *extra, *out])
    with pytest.raises(InputError, match="model none does not exist"):
        main(["none", *out])
    broken = evaluated.write_folder(tmp_path / "broken", evaluated.make_tokenizer())
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        main([command[0], str(broken), *command[2:], *out])
    assert not (tmp_path / "out").exists()


def test_equal_names_stay_apart(command: list[str], tokenizer: Any, tmp_path: Path) -> None:
    twin = evaluated.write_folder(tmp_path / "other" / "m0", tokenizer, 1)
    out = tmp_path / "out"
    main([command[0], str(twin), *command[2:], "--tasks", "story", "--out", str(out)])
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["m0", str(twin)]


def test_a_runs_numbers_become_its_scalars(tokenizer: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = evaluated.make_model(tokenizer.vocab_size)
    found, losses = evaluate_text(
        evaluated.make_subject(tmp_path, model, tokenizer), Text("story", "en to tre " * 9), 16, 4
    )
    run = tmp_path / "run"
    curve = {"text": "story", "length": 16} | losses
    _to_tensorboard(SavedModel(model, run, run, 30, {}), found, [curve])
    events = EventAccumulator(str(run))
    events.Reload()
    (scalar,) = events.Scalars("evaluation_perplexity/story_16/per_token_exact")
    assert (scalar.step, scalar.value) == (30, pytest.approx(found[0].value))
    by_position = events.Scalars("loss_by_position/story_16")
    assert [event.step for event in by_position] == [round(p) for p in curve["position"]]
    _to_tensorboard(SavedModel(model, tmp_path / "folder", None, None, {}), found, [])
    assert not (tmp_path / "folder").exists()


def test_a_model_without_a_number_has_an_empty_cell() -> None:
    rows = [Score("a", "short", "t", None, "acc", 0.5, None, 1)]
    rows.append(Score("b", "short", "u", None, "acc", 0.25, 0.1, 4))
    assert markdown(rows, ["note"]).splitlines()[4:] == [
        "| task | metric | items | a | b |",
        "| --- | --- | ---: | ---: | ---: |",
        "| t | acc | 1 | 50.0 |  |",
        "| u | acc | 4 |  | 25.0 ± 10.0 |",
        "",
        "* note",
    ]


def test_the_short_suite_names_its_extra(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    command[command.index("ruler")] = "short"
    main([*command, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "left out: short: the suite short needs lm_eval.evaluator, which is missing" in said
    assert "pip install 'ropepp[eval]'" in said


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_answers_are_what_the_whole_text_has_beyond_the_prompt(scheme: str) -> None:
    """Of a tokenizer that marks the beginning of a text, as Llama 2's does."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([evaluated.sentence(Random(0), 2000), ":\n ."], trainer)
    tokenizer = BpeTokenizer(backend.to_str(), "test")
    task = Repeat()
    begins = set()
    for sample in task.samples(tokenizer, 40, 6, 0):
        task.samples = lambda *args, one=sample: [one]  # type: ignore[method-assign]
        (encoded,) = encoded_samples(task, tokenizer, 40, 1, 0)
        gap = "" if sample.prompt.endswith(" ") else " "
        for answer, ids in zip(sample.answers, encoded.answers, strict=True):
            (whole,) = tokenizer.encode_batch([f"{sample.prompt}{gap}{answer}"])
            if gap:  # otherwise the mark of the first word stands before it, in the prompt
                assert whole == encoded.prompt + ids
            assert tokenizer.decode(encoded.prompt + ids) == tokenizer.decode(whole)
            begins.add(tokenizer.encode_batch([answer])[0] == ids)
    assert begins == {True, False}  # alone, an answer has a mark that it has not behind a space


def test_the_papers_protocol_is_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    model = str(evaluated.write_folder(tmp_path / "m", tokenizer))
    options = ["--suite", "babilong", "--tasks", "qa1", "--lengths", "4096", "--samples", "2"]
    rows = {}
    for protocol in ("official", "paper"):
        out = tmp_path / protocol
        main([model, *options, "--device", "cpu", "--protocol", protocol, "--out", str(out)])
        content = json.loads((out / "evaluation.json").read_text())
        assert content["settings"]["protocol"] == protocol
        rows[protocol] = {(row["suite"], row["metric"]) for row in content["results"]}
        assert f"protocol {protocol}" in (out / "evaluation.md").read_text()
    assert rows["official"] == {("babilong", m) for m in ("score", "official", "simple", NLL)}
    assert rows["paper"] == {("babilong, paper", "score"), ("babilong, paper", NLL)}
