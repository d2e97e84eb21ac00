"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ropepp.errors import InputError, at_least

COLDEST = 1e-6  # below it quotients may be no numbers


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise draws from softmax(logits / temperature), restricted."""

    temperature: float = 0.0
    top_k: int | None = None  # only the k likeliest tokens can be drawn (arXiv 1805.04833)
    # Only the likeliest tokens can be drawn whose probabilities first reach p together (nucleus
    # sampling, arXiv 1904.09751); after top_k.
    top_p: float | None = None

    def __post_init__(self) -> None:
        at_least(0, temperature=self.temperature)
        at_least(1, top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """(B, V) float32, from which tokens are drawn; the temperature is above 0."""
        logits = logits_BV.float() / max(self.temperature, COLDEST)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            sorted_p, order = logits.softmax(-1).sort(dim=-1, descending=True)
            # A token stays if those before it have not reached p; the first always does.
            beyond = sorted_p.cumsum(-1) - sorted_p >= self.top_p
            hidden = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits.softmax(-1)

    def choose(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next token of every row, (B, 1) int64."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1, keepdim=True)
        return self.probabilities(logits_BV).multinomial(1, generator=generator)
