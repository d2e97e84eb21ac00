"""Continues a prompt, token by token."""

import torch
from torch import Tensor

from ropepp.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Appends ``max_new_tokens`` tokens to every row, by recomputation of the whole row.

    Args:
        model: The model, in evaluation mode.
        input_ids: (B, T) int64.
        max_new_tokens: Number of tokens to append (n).
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits /
            temperature).
        generator: Source of randomness of the draws.

    Returns:
        (B, T + n) int64.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    for _ in range(max_new_tokens):
        last = model.lm_head(model.hidden(input_ids)[:, -1]).float()
        if temperature == 0:
            token = last.argmax(dim=-1, keepdim=True)
        else:
            token = (last / temperature).softmax(dim=-1).multinomial(1, generator=generator)
        input_ids = torch.cat((input_ids, token), dim=1)
    return input_ids
