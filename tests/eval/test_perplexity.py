"""Sliding-window perplexity against loops that recompute each token's loss by itself."""

import math
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import evaluated
from ropepp.data.tokenizer import BytesTokenizer
from ropepp.errors import InputError
from ropepp.eval.perplexity import PAPER, Text, evaluate_text, read_text, windows
from ropepp.model.positions import ALiBi, RoPE, RoPEppEC
from ropepp.model.transformer import Transformer

TEXT = Text("story", evaluated.sentence(Random(5), 60) + ".\n\nDen höchsten Bergen")


def token_loss(model: Transformer, context: list[int], target: int) -> float:
    logits = model(torch.tensor([context]))[0, -1].double()
    return (logits.logsumexp(0) - logits[target]).item()


def brute_force(
    model: Transformer, ids: list[int], window: int, stride: int
) -> tuple[list[float], int]:
    """Each token's loss, one forward pass a token: it is scored by the first window that has it, of
    those that end every stride from the first full one on; and the number of these windows."""
    losses, ends = [], set()
    for t in range(1, len(ids)):
        end = max(window // stride, t // stride + 1) * stride
        losses.append(token_loss(model, ids[max(0, end - window) : t], ids[t]))
        ends.add(end)
    return losses, len(ends)


def paper_loop(
    model: Transformer, ids: list[int], window: int, stride: int, end_of_text: int
) -> tuple[float, list[float]]:
    """What the authors' loop ends with, nan where it divides by 0, and the value of each window."""
    values = []
    for i in range(0, len(ids), stride):
        own = ids[max(i + stride - window, 0) : i + stride]
        labels = list(own)
        labels[:-stride] = [end_of_text] * len(labels[:-stride])
        nll = -model(torch.tensor([own]))[0].double().log_softmax(-1)
        losses = [nll[t - 1, own[t]].item() for t in range(1, len(own)) if labels[t] != end_of_text]
        values.append(sum(losses) / len(losses) * stride if losses else math.nan)
    return math.exp(sum(values) / i) if i else math.nan, values


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC(), ALiBi()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize(("window", "stride"), [(24, 7), (24, 23), (64, 8), (4096, 512)])
def test_every_token_counts_once(
    window: int, stride: int, kind: str, position: Any, tmp_path: Path
) -> None:
    tokenizer: Any = evaluated.make_tokenizer() if kind == "bpe" else BytesTokenizer()
    text = TEXT if kind == "bpe" else Text("short", TEXT.text[-60:])
    model = evaluated.make_model(tokenizer.vocab_size, position)
    subject = evaluated.make_subject(tmp_path, model, tokenizer, batch_tokens=100)
    found = {row.metric: row for row in evaluate_text(subject, text, window, stride)[0]}
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode_batch([text.text])[0]
    losses, number = brute_force(model, ids, window, stride)
    assert len(losses) == len(ids) - 1
    total = math.fsum(losses)
    expected = {
        "per token, exact": math.exp(total / len(losses)),
        "per word": math.exp(total / len(text.text.split())),
        "bits per byte": total / math.log(2) / len(text.text.encode()),
    }
    for metric, value in expected.items():
        assert found[metric].value == pytest.approx(value, rel=1e-5)
        assert found[metric].n == number
        assert (found[metric].stderr is None) == (number == 1)


# Shorter than a window; no multiple of the stride; a multiple of it; long. The last two strides do
# not divide the window, and the last leaves windows of no more tokens than the stride.
@pytest.mark.parametrize("tokens", [20, 53, 96, 301])
@pytest.mark.parametrize(("window", "stride"), [(64, 8), (32, 16), (24, 7), (24, 23)])
@pytest.mark.parametrize("end_of_text", [256, ord("e")])
def test_the_papers_number_is_that_of_its_loop(
    tokens: int, window: int, stride: int, end_of_text: int, tmp_path: Path
) -> None:
    tokenizer = BytesTokenizer()
    tokenizer.eot_id = end_of_text  # a letter that the text has: labels that do not count
    model = evaluated.make_model(tokenizer.vocab_size, RoPEppEC(), seed=3)
    subject = evaluated.make_subject(tmp_path, model, tokenizer, batch_tokens=100)
    text = evaluated.sentence(Random(5), 99)[:tokens]
    said = []

    @contextmanager
    def leaving_out(what: str) -> Any:
        try:
            yield
        except InputError as error:
            said.append(f"{what}: {error}")

    rows, _ = evaluate_text(subject, Text("cut", text), window, stride, leaving_out)
    found = {row.metric: row for row in rows}
    expected, values = paper_loop(model, list(text.encode()), window, stride, end_of_text)
    if math.isnan(expected):
        assert said == [
            f"cut {window}, {PAPER}: undefined: the text has no more tokens than the stride"
        ]
        assert PAPER not in found
    else:
        assert found[PAPER].value == pytest.approx(expected, rel=1e-5)
        assert found[PAPER].n == len(values)
        error = torch.tensor(values).double().std().item() * len(values) ** 0.5
        error *= expected / (stride * (len(values) - 1))  # of the sum, divided as the sum is
        assert found[PAPER].stderr == pytest.approx(error, rel=1e-4)


def test_a_window_with_nothing_to_count_has_no_number(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    tokenizer.eot_id = ord("e")
    model = evaluated.make_model(tokenizer.vocab_size)
    subject = evaluated.make_subject(tmp_path, model, tokenizer)
    text = Text("e", "abcd" + 4 * "e" + "abc")
    assert math.isnan(paper_loop(model, list(text.text.encode()), 8, 4, ord("e"))[0])
    rows, _ = evaluate_text(subject, text, 8, 4)
    assert [row.metric for row in rows] == ["per token, exact", "per word", "bits per byte"]


def test_loss_by_position_counts_every_prediction_of_every_window(tmp_path: Path) -> None:
    tokenizer = evaluated.make_tokenizer()
    model = evaluated.make_model(tokenizer.vocab_size)
    subject = evaluated.make_subject(tmp_path, model, tokenizer)
    found = evaluate_text(subject, TEXT, 30, 10)[1]
    ids = [tokenizer.bos_id, *tokenizer.encode_batch([TEXT.text])[0]]
    cut = windows(len(ids), 30, 10)
    by_context: dict[int, list[float]] = {}
    for w in cut:
        for i in range(w.start + 1, w.end):
            loss = token_loss(model, ids[w.start : i], ids[i])
            by_context.setdefault(i - w.start, []).append(loss)
    assert sum(found["count"]) == sum(map(len, by_context.values()))
    for n in (1, 2, 3, 4, 5):  # four bins an octave: each has a bin to itself
        k = found["position"].index(n)
        assert found["loss"][k] == pytest.approx(sum(by_context[n]) / len(by_context[n]), rel=1e-5)
    assert found["position"][-1] == (27 + 28 + 29) / 3
    last = [loss for n in (27, 28, 29) for loss in by_context[n]]
    assert found["loss"][-1] == pytest.approx(sum(last) / len(last), rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 300), st.integers(2, 60), st.data())
def test_windows_score_every_token_once_with_enough_context(
    tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    cut = windows(tokens, window, stride)
    scored = [i for w in cut for i in range(w.end - w.scored, w.end)]
    assert scored == list(range(1, tokens))
    for number, w in enumerate(cut):
        assert 2 <= w.end - w.start <= window
        assert w.end == tokens or w.end % stride == 0
        if number:
            assert w.end - w.scored - w.start >= window - stride


def test_standard_error_is_that_of_repeated_texts(tmp_path: Path) -> None:
    """Windows without overlap of one token each but the first: the spread of independent losses."""
    tokenizer = evaluated.make_tokenizer()
    model = evaluated.make_model(tokenizer.vocab_size)
    subject = evaluated.make_subject(tmp_path, model, tokenizer)
    rows = {row.metric: row for row in evaluate_text(subject, TEXT, 2, 1)[0]}
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode_batch([TEXT.text])[0]])
    nll, _ = model.evaluate(ids[:-1].unsqueeze(1), ids[1:].unsqueeze(1))
    error = nll.double().std().item() / len(nll) ** 0.5
    exact = rows["per token, exact"]
    assert exact.stderr == pytest.approx(exact.value * error, rel=1e-5)


def test_texts_are_files_as_they_are_or_joined_lines(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\n two\n")
    assert read_text(plain) == Text("a", "one\n\n two\n")
    lines = tmp_path / "b.jsonl"
    evaluated.write_lines(lines, [{"text": "one"}, {"text": ""}, {"text": "tw\u2028o"}])
    assert read_text(lines, "name") == Text("name", "one\n\n\n\ntw\u2028o")


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt is missing"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"bad\.txt: not UTF-8 at byte 2"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2"):
        read_text(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="stride is 8, the window 8"):
        windows(100, 8, 8)
    with pytest.raises(InputError, match="1 tokens"):
        windows(1, 8, 4)
