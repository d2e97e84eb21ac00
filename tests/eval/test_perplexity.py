"""Sliding-window perplexity against loops that recompute each token's loss by itself."""

import math
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
from ropepp.eval.perplexity import Text, evaluate_text, read_text, windows
from ropepp.model.positions import ALiBi, RoPE, RoPEppEC
from ropepp.model.transformer import Transformer

TEXT = Text("story", evaluated.sentence(Random(5), 60) + ".\n\nDen höchsten Bergen")


def token_loss(model: Transformer, context: list[int], target: int) -> float:
    logits = model(torch.tensor([context]))[0, -1].double()
    return (logits.logsumexp(0) - logits[target]).item()


def brute_force(
    model: Transformer, ids: list[int], window: int, stride: int
) -> tuple[list[float], list[list[float]]]:
    """Each token's loss from the window that scores it, one forward pass a token; and the same
    window by window."""
    losses, by_window, start, t = [], [], 0, 1
    while t < len(ids):
        end = min(start + window, len(ids))
        own = [token_loss(model, ids[start:i], ids[i]) for i in range(t, end)]
        losses += own
        by_window.append(own)
        t, start = end, start + stride
    return losses, by_window


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC(), ALiBi()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize(("window", "stride"), [(24, 7), (24, 23), (64, 8), (4096, 512)])
def test_both_definitions_agree_with_brute_force(
    window: int, stride: int, kind: str, position: Any, tmp_path: Path
) -> None:
    tokenizer: Any = evaluated.make_tokenizer() if kind == "bpe" else BytesTokenizer()
    text = TEXT if kind == "bpe" else Text("short", TEXT.text[-60:])
    model = evaluated.make_model(tokenizer.vocab_size, position)
    subject = evaluated.make_subject(tmp_path, model, tokenizer, batch_tokens=100)
    found = {row.metric: row for row in evaluate_text(subject, text, window, stride)[0]}
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode_batch([text.text])[0]
    losses, by_window = brute_force(model, ids, window, stride)
    assert len(losses) == len(ids) - 1
    total = math.fsum(losses)
    means = [math.fsum(own) / len(own) for own in by_window]
    expected = {
        "per token, exact": math.exp(total / len(losses)),
        "per token, paper": math.exp(math.fsum(means) / len(means)),
        "per word": math.exp(total / len(text.text.split())),
        "bits per byte": total / math.log(2) / len(text.text.encode()),
    }
    for metric, value in expected.items():
        assert found[metric].value == pytest.approx(value, rel=1e-5)
        assert found[metric].n == len(by_window)
        assert (found[metric].stderr is None) == (len(by_window) == 1)


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
        assert w.start == number * stride
        assert w.end - w.start <= window
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
    exact, paper = rows["per token, exact"], rows["per token, paper"]
    assert exact.value == pytest.approx(paper.value)
    assert exact.stderr == pytest.approx(exact.value * error, rel=1e-5)
    assert paper.stderr == pytest.approx(exact.stderr, rel=1e-5)


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
