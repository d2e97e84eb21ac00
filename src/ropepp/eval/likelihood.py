"""Log-likelihoods of continuations, where those of one context share its keys and values."""

import copy
from collections.abc import Sequence

import torch

from ropepp.generate.decode import read
from ropepp.model.cache import KVCache
from ropepp.model.loss import IGNORE_INDEX, token_losses
from ropepp.model.transformer import Transformer

Ids = Sequence[int]
Batch = Sequence[Ids]


@torch.inference_mode()
def score_continuations(
    model: Transformer, context: Ids, continuations: Batch, batch_tokens: int
) -> list[float]:
    """The summed negative log-likelihoods in nats of a context's continuations; the context, of one
    token at least, is read once."""
    before, longest = context[:-1], max(map(len, continuations))
    cache = KVCache(len(model.layers), len(before) + longest)
    if before:
        read(model, torch.tensor([before], device=model.embed_tokens.weight.device), cache)
    return continue_cached(model, cache, [context], [continuations], batch_tokens)[0]


@torch.inference_mode()
def continue_cached(
    model: Transformer,
    cache: KVCache,
    contexts: Batch,
    continuations: Sequence[Batch],
    batch_tokens: int,
) -> list[list[float]]:
    """The same of several contexts, with a cache that holds all but the last token of each, padded
    on the left, and stays as it is; there are at most ``batch_tokens`` in their rows at a time,
    contexts counted."""
    device = model.embed_tokens.weight.device
    rows = [(g, ids) for g, own in enumerate(continuations) for ids in own]
    longest = max((len(ids) for _, ids in rows), default=0)
    step = max(1, batch_tokens // (cache.length + longest + 1))
    found: list[list[float]] = [[] for _ in contexts]
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        n = max(1, *(len(ids) for _, ids in chunk))
        tokens = [_padded([contexts[g][-1], *ids[:-1]], n, 0) for g, ids in chunk]
        targets = [_padded(ids, n, IGNORE_INDEX) for _, ids in chunk]
        place = torch.tensor([len(contexts[g]) - 1 for g, _ in chunk], device=device)
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]
        own.select(torch.tensor([g for g, _ in chunk], device=device))
        positions = place.unsqueeze(1) + torch.arange(n, device=device)
        hidden = model.hidden(torch.tensor(tokens, device=device), positions, None, own)
        nll, _ = token_losses(
            hidden, model.lm_head.weight, torch.tensor(targets, device=device), IGNORE_INDEX
        )
        # In float64 on the host, where every device has it.
        for (g, _), total in zip(chunk, nll.cpu().double().sum(1).tolist(), strict=True):
            found[g].append(total)
    return found


def _padded(ids: Ids, n: int, value: int) -> list[int]:
    return [*ids, *[value] * (n - len(ids))]
