"""Perplexity of texts with a sliding window.

Windows of at most W tokens end every S tokens, the first at the greatest multiple of S that is at
most W, the last at the end of the text. The first scores all of its tokens but the first, which
nothing predicts, every later one those that no window before has scored, each with at least W - S
tokens before it. A tokenizer's BOS begins the text. With l_t the cross entropy of token t and N_w
the tokens that window w scores:

    exact   exp(sum_t l_t / sum_w N_w)                   every token weighs the same

The paper's loop has more windows and another weight for each. One ends at every multiple of S, from
S on, and one at the end of the text; its last S tokens count, without end-of-text and without the
text's first token. With m_w their mean loss and n the number of windows:

    paper   exp(sum_w m_w / (n - 1))                     a window too few in the divisor

It is undefined for n = 1, and where a window has nothing to count. A window that ends within the
first one is its beginning: both definitions come from the same passes.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ropepp.data.text import readers
from ropepp.data.text.readers import read_column
from ropepp.errors import InputError
from ropepp.eval.evaluated_model import EvaluatedModel, digest
from ropepp.eval.scores import Score, mean_of, ratio_of
from ropepp.files import printable
from ropepp.generate.text import document_ids
from ropepp.train.evaluation import context_bins

PAPER = "per token, paper"


class Text(NamedTuple):
    """A text and what tables call it."""

    name: str
    text: str


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` of a text, of which the last ``scored`` are scored."""

    start: int
    end: int
    scored: int


def read_text(path: Path, name: str | None = None) -> Text:
    """A text file as it is, or the column ``text`` of a .jsonl file, joined by blank lines. An
    `InputError` if it is missing, empty, no UTF-8, or a line is no object with "text"."""
    if not path.is_file():
        raise InputError(
            f"{printable(path)} is missing; it must be a text, or .jsonl lines with 'text'"
        )
    lines = path.suffix.lower() == ".jsonl"
    text = "\n\n".join(read_column(path, "text")) if lines else readers.read_text(path)
    if not text.strip():
        raise InputError(f"{printable(path)} is empty; it must have text")
    return Text(name or printable(path.stem), text)


def windows(tokens: int, window: int, stride: int) -> list[Window]:
    """The windows of a text of so many tokens; an `InputError` if the stride is not between 1 and
    ``window - 1``, or there is nothing to predict."""
    if not 1 <= stride < window:
        raise InputError(f"stride is {stride}, the window {window}; allowed: 1 to {window - 1}")
    if tokens < 2:
        raise InputError(f"a text has {tokens} tokens; at least 2 are needed")
    out, done, end = [], 1, window // stride * stride
    while done < tokens:
        start, end = max(0, end - window), min(end, tokens)
        out.append(Window(start, end, end - done))
        done, end = end, end + stride
    return out


def evaluate_text(
    subject: EvaluatedModel,
    text: Text,
    window: int,
    stride: int,
    leaving_out: Callable[[str], AbstractContextManager[None]] = lambda what: suppress(InputError),
) -> tuple[list[Score], dict[str, list[float]]]:
    """Perplexity of a text; see the top of this file for its two definitions. ``leaving_out`` is
    around what may be undefined, which raises an `InputError` there; other errors are those of
    `windows`, which has ``window`` and ``stride``.

    Besides, what compares models with different tokenizers: perplexity per word, the exponential of
    the summed loss over words, and bits per byte. Standard errors take windows as independent.

    Returns rows of the table, and mean loss by number of tokens before, over all windows, in bins
    that grow with it, four an octave."""
    ids = torch.tensor(document_ids(subject.tokenizer, text.text))
    end = subject.tokenizer.eot_id
    cut = windows(len(ids), window, stride)
    contents = [digest(ids[w.start : w.end].tolist(), w.scored, stride, end) for w in cut]
    size = max(1, subject.batch_tokens // window)
    full = [i for i, w in enumerate(cut) if w.end - w.start == window]
    batches = [full[i : i + size] for i in range(0, len(full), size)]
    batches += [[i] for i in sorted({*range(len(cut))} - {*full})]  # the first and the last

    def run(batch: list[int]) -> list[dict[str, object]]:
        rows = torch.stack([ids[cut[i].start : cut[i].end] for i in batch])
        rows = rows.to(subject.model.embed_tokens.weight.device)
        with torch.inference_mode():
            nll, _ = subject.model.evaluate(rows[:, :-1], rows[:, 1:])
        return [
            {
                "nll": loss[-cut[i].scored :].sum().item(),
                "by_position": _binned(loss),
                "paper": _paper_sums(loss, row[1:] != end, cut[i], stride),
            }
            for i, loss, row in zip(batch, nll.cpu().double(), rows.cpu(), strict=True)
        ]

    values = subject.measure(f"perplexity {text.name}", window, contents, batches, run)
    sums, counts = [value["nll"] for value in values], [w.scored for w in cut]
    rows = _rows(subject.name, text, window, sums, counts)
    with leaving_out(f"{text.name} {window}, {PAPER}"):
        parts = [part for value in values for part in value["paper"]]
        number = Score(subject.name, "perplexity", text.name, window, PAPER, *_paper(parts))
        rows.insert(1, number)
    return rows, _by_position([value["by_position"] for value in values], cut)


def _paper_sums(
    loss_T: Tensor, counted_T: Tensor, own: Window, stride: int
) -> list[tuple[float, int]]:
    """Summed loss and number of the tokens that count in each window of the paper's loop that ends
    within this one."""
    found = []
    for end in [*range(stride, own.end, stride), own.end] if own.start == 0 else [own.end]:
        targets = end - own.start - 1  # the first token is nobody's
        scored = slice(max(0, targets - stride), targets)
        losses = loss_T[scored][counted_T[scored]]
        found.append((losses.sum().item(), len(losses)))
    return found


def _paper(parts: Sequence[tuple[float, int]]) -> tuple[float, float | None, int]:
    """The paper's perplexity, its standard error and the number of windows."""
    n = len(parts)
    if n < 2:
        raise InputError("undefined: the text has no more tokens than the stride")
    if not all(count for _, count in parts):
        raise InputError("undefined: the tokens that a window would count are end-of-text")
    mean, error = mean_of([total / count for total, count in parts])
    value = _exp(mean * n / (n - 1))
    return value, value * error * n / (n - 1) if error is not None else None, n


def _rows(
    model: str, text: Text, window: int, sums: Sequence[float], counts: Sequence[int]
) -> list[Score]:
    mean, error = ratio_of(sums, counts)
    total = math.fsum(counts)
    scales = {
        "per token, exact": 1.0,
        "per word": total / len(re.split(r"\s+", text.text)),  # words as lm-eval counts them
        "bits per byte": total / len(text.text.encode()) / math.log(2),
    }
    rows = []
    for metric, scale in scales.items():
        value, stderr = mean * scale, None if error is None else error * scale
        if metric != "bits per byte":
            value = _exp(value)
            stderr = None if stderr is None else value * stderr
        rows.append(Score(model, "perplexity", text.name, window, metric, value, stderr, len(sums)))
    return rows


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _binned(loss_T: Tensor) -> list[float]:
    """Sums of a window's losses in the bins that have tokens."""
    bins = context_bins(len(loss_T))
    return bins.bincount(loss_T)[bins.unique()].tolist()


def _by_position(sums: Sequence[Sequence[float]], cut: Sequence[Window]) -> dict[str, list[float]]:
    bins = context_bins(max(w.end - w.start for w in cut) - 1)
    losses, counts = torch.zeros(2, int(bins[-1]) + 1, dtype=torch.float64)
    for own, w in zip(sums, cut, strict=True):
        filled, sizes = bins[: w.end - w.start - 1].unique(return_counts=True)
        losses[filled] += torch.tensor(own, dtype=torch.float64)
        counts[filled] += sizes
    some = counts > 0
    return {
        "position": (bins.bincount(1.0 + torch.arange(len(bins))) / bins.bincount())[some].tolist(),
        "loss": (losses / counts)[some].tolist(),
        "count": counts[some].tolist(),
    }
