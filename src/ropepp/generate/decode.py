"""Prompts into the cache in chunks, then token by token."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ropepp.errors import InputError
from ropepp.generate.sampling import Sampling
from ropepp.model.cache import KVCache
from ropepp.model.transformer import Transformer

PREFILL = 2048  # tokens of a row that are read at a time: activations are those of so many


def generate(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
) -> Tensor:
    """Appends at most ``max_new_tokens`` (n) tokens to every row of ``input_ids`` (B, T) int64:
    (B, T + n) int64, or less where all rows have ended. An `InputError` if a number is out of its
    range, a row ends with padding, or the model's logits are no finite numbers.

    Args:
        temperature: 0 takes the likeliest token; otherwise, as ``top_k`` and ``top_p``, see
            `Sampling`; the draws are of ``generator``, on the model's device.
        document_ids: (B, T) int64; new tokens belong to a row's last document. -1 is padding on the
            left, where prompts are of different lengths, see `pad_left`.
        stop_ids: Tokens that end a row; one that has ended repeats its last token until all have.
        cache: What was read before, to which these prompts are added; a new one unless given.
    """
    sampling = Sampling(temperature, top_k, top_p)
    tokens = stream(
        model, input_ids, max_new_tokens, sampling, generator, document_ids,
        stop_ids=stop_ids, cache=cache,
    )  # fmt: skip
    return torch.cat((input_ids, *tokens), dim=1)


def stream(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
    *,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yields each step's tokens (B, 1) as soon as they are known; arguments as in `generate`."""
    if max_new_tokens < 0 or not input_ids.shape[1]:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, the prompt has {input_ids.shape[1]} tokens; these"
            " must be at least 0 and 1"
        )
    if document_ids is not None and cache is not None and cache.length:
        raise InputError("document_ids need an empty cache: positions of what it holds are unknown")
    if document_ids is not None and bool((document_ids[:, -1] < 0).any()):
        raise InputError("a prompt ends with padding (document id -1): pad on the left")
    positions = None
    if document_ids is not None:  # they count a row's own tokens, padding left out
        positions = ((document_ids >= 0).cumsum(1) - 1).clamp(min=0)
    if cache is None:
        cache = KVCache(len(model.layers), input_ids.shape[1] + max_new_tokens)
    ends = torch.tensor(sorted(stop_ids), device=input_ids.device)
    tokens, ended = input_ids, torch.zeros_like(input_ids[:, :1], dtype=torch.bool)
    finite = torch.ones((), dtype=torch.bool, device=input_ids.device)
    for number in range(max_new_tokens):
        # A generator must not leave its caller in inference mode.
        with torch.inference_mode():
            last = read(model, tokens, cache, positions, document_ids)[:, -1]
            logits = model.lm_head(last)
            finite = finite & logits.isfinite().all()
            if number == 0:  # asking the device each time would wait for it
                _require_finite(finite)
            chosen = sampling.choose(logits, generator)
            chosen = torch.where(ended, tokens[:, -1:], chosen)
        yield chosen
        if len(ends):
            ended |= torch.isin(chosen, ends)
            if bool(ended.all()):
                break
        tokens = chosen
        positions = positions[:, -1:] + 1 if positions is not None else None
        document_ids = document_ids[:, -1:] if document_ids is not None else None
    _require_finite(finite)


def _require_finite(finite: Tensor) -> None:
    if not bool(finite):
        raise InputError(
            "the model's logits are no finite numbers: its weights are damaged, or its training has"
            " diverged"
        )


def read(
    model: Transformer,
    input_ids: Tensor,
    cache: KVCache,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Adds tokens to the cache in chunks; returns the last chunk's hidden states, (B, n, M)."""
    for start in range(0, input_ids.shape[1], PREFILL):
        part = slice(start, start + PREFILL)
        own, documents = (x if x is None else x[:, part] for x in (positions, document_ids))
        hidden = model.hidden(input_ids[:, part], own, documents, cache)
    return hidden


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end: int,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """Likeliest continuations of prompts of any lengths, read as one batch, that end before the
    token ``end``; prompts and continuations are added to the cache, a new one unless given."""
    ids, documents = pad_left(prompts, model.embed_tokens.weight.device)
    found = generate(
        model, ids, max_new_tokens, document_ids=documents, stop_ids=(end,), cache=cache
    )
    rows = found[:, ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths as rows that end together, with token 0 before them: tokens (B, T)
    int64, and document ids (B, T) int64, -1 at padding; None if there is no padding."""
    T = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)
    if all(len(prompt) == T for prompt in prompts):
        return ids, None
    documents = [[-1] * (T - len(p)) + [0] * len(p) for p in prompts]
    return ids, torch.tensor(documents, device=device)
