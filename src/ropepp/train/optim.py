"""Optimizers as specs of plain values."""

from dataclasses import dataclass

import torch
from torch import nn

from ropepp.errors import InputError


@dataclass(frozen=True)
class OptimizerSpec:
    """What `ropepp.train.module.LanguageModel` asks of an optimizer."""

    lr: float = 5e-4

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise InputError(f"lr is {self.lr}; it must be at least 0")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the parameters of ``model``."""
        raise TypeError(f"{type(self).__name__} is no optimizer; choose a sub-class such as AdamW")


@dataclass(frozen=True)
class AdamW(OptimizerSpec):
    """AdamW with decoupled weight decay (arXiv 1711.05101), fused; defaults are the paper's recipe.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decay per step, times the learning rate.
        decay_norms: Whether the weights of norms decay too.
        decay_embeddings: Whether the embedding matrix decays too.
    """

    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = False
    decay_embeddings: bool = True

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        decay: list[nn.Parameter] = []
        keep: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            decays = parameter.ndim > 1 or self.decay_norms
            if name.startswith("embed_tokens."):
                decays = self.decay_embeddings
            (decay if decays else keep).append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay},
            {"params": keep, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
