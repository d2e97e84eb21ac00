"""From prompts as text to continuations as text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ropepp.data.tokenizer import Tokenizer, decode_behind, tail
from ropepp.errors import InputError
from ropepp.generate.decode import pad_left, stream
from ropepp.generate.sampling import Sampling
from ropepp.model.cache import KVCache
from ropepp.model.transformer import Transformer

UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to


class TextStream:
    """Turns tokens into text piece by piece: nothing that a later token could change is given out.
    Stops end the stream, and are left out; ``before`` are ids of the text that it goes on after.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.finished = False
        self.ids: list[int] = []
        self.text = ""  # that was given out
        self._before = tail(tokenizer, before)

    def push(self, token: int) -> str:
        """The text that is certain with one more token; "" once finished."""
        if self.finished:
            return ""
        self.finished = token == self.tokenizer.eot_id
        if not self.finished:
            self.ids.append(token)
        text = self._text()
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.finished = True
            return self._give(text[: min(found)])
        return self._give(text) if self.finished else self._give(text[: self._certain(text)])

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.finished:
            return ""
        self.finished = True
        return self._give(self._text())

    def _text(self) -> str:
        return decode_behind(self.tokenizer, self._before, self.ids)

    def _give(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new

    def _certain(self, text: str) -> int:
        """Characters that no later token can change or make part of a stop."""
        end = len(text.rstrip(UNFINISHED))
        begun = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        return end - max((len(x) for x in begun if text[:end].endswith(x)), default=0)


@dataclass
class Continuation:
    """What a model has added to a prompt."""

    prompt: str
    text: str  # without stops
    tokens: list[int]  # without end-of-text
    stopped: bool  # whether it came to an end by itself


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The beginning of a document, with BOS if the tokenizer has one."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode_batch([text])[0]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as a document's beginning; an `InputError` if that has no token."""
    ids = document_ids(tokenizer, prompt)
    if not ids:
        raise InputError("a prompt is empty, and the tokenizer has no begin-of-text token")
    return ids


def continue_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    stops: Sequence[str] = (),
    show: Callable[[str], object] | None = None,
) -> tuple[list[Continuation], str]:
    """Continues prompts in one batch; ``stops`` end a continuation, as end-of-text does, and
    ``show`` gets the first row's text as it comes. Returns also how fast it was, in words."""
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ids, documents = pad_left(encoded, model.embed_tokens.weight.device)
    cache = KVCache(len(model.layers), ids.shape[1] + max_new_tokens)
    rows = [TextStream(tokenizer, stops, own) for own in encoded]
    seconds: list[float] = []  # of each step, of which the first reads the prompts
    written = 0  # by the others, in all rows
    steps = stream(model, ids, max_new_tokens, sampling, generator, documents, cache=cache)
    clock = time.perf_counter()
    for number, tokens in enumerate(steps):
        values = tokens.flatten().tolist()  # waits for the device
        seconds.append(time.perf_counter() - clock)
        for i, token in enumerate(values):
            written += number > 0 and not rows[i].finished
            new = rows[i].push(token)
            if show is not None and i == 0:
                show(new)
        if all(row.finished for row in rows):
            break
        clock = time.perf_counter()
    speed = f"{sum(map(len, encoded)):,} tokens read in {sum(seconds[:1]):.2f} s"
    if seconds[1:]:
        speed += f", {written:,} written at {written / sum(seconds[1:]):,.1f} tokens/s"
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        stopped, rest = row.finished, row.end()
        if show is not None and row is rows[0]:
            show(rest)
        found.append(Continuation(prompt, row.text, row.ids, stopped))
    return found, f"{speed}; KV cache {cache.bytes:,} bytes"
