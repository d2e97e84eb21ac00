"""Continues prompts, token by token, with a KV cache."""

import torch
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.cache import KVCache
from ropepp.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Appends ``max_new_tokens`` tokens to every row.

    Prompts of different lengths are padded on the left, with ``document_ids`` -1 there.

    Args:
        model: The model, in evaluation mode.
        input_ids: (B, T) int64.
        max_new_tokens: Number of tokens to append (n).
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits /
            temperature).
        generator: Source of randomness of the draws.
        positions: (B, T) int64; by default they count a row's own tokens, padding left out. New
            tokens go on from a row's last position.
        document_ids: (B, T) int64; new tokens belong to a row's last document.

    Returns:
        (B, T + n) int64.

    Raises:
        InputError: The temperature is negative, or a row ends with padding.
    """
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; it must be at least 0")
    if document_ids is not None:
        if bool((document_ids[:, -1] < 0).any()):
            raise InputError("a prompt ends with padding (document id -1): pad on the left")
        if positions is None:
            positions = ((document_ids >= 0).cumsum(1) - 1).clamp(min=0)
    cache = KVCache(len(model.layers))
    tokens = input_ids
    for _ in range(max_new_tokens):
        hidden = model.hidden(tokens, positions, document_ids, cache)
        token = _choose(model.lm_head(hidden[:, -1]).float(), temperature, generator)
        input_ids = torch.cat((input_ids, token), dim=1)
        tokens = token
        positions = positions[:, -1:] + 1 if positions is not None else None
        document_ids = document_ids[:, -1:] if document_ids is not None else None
    return input_ids


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    return (logits_BV / temperature).softmax(dim=-1).multinomial(1, generator=generator)
