"""Gaussian noise on rotated queries: which kind of head does a model rely on?

The hooks sit on the position layers and cost nothing once removed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ropepp.errors import InputError
from ropepp.model.transformer import Transformer

# (kind, layer, shape of the queries of that kind (B, T, heads, D)) -> standard normal noise
NoiseSource = Callable[[str, int, torch.Size], Tensor]


@contextmanager
def noisy_queries(
    model: Transformer,
    std: float,
    target: Literal["real", "imaginary", "both"],
    noise: NoiseSource | None = None,
) -> Iterator[None]:
    """Inside the context, adds noise to the queries of the real or imaginary heads of all layers.

    Args:
        model: A model whose layout has heads of the kind: phase 0 is real, -90 degrees imaginary.
        std: Standard deviation of the noise, in units of the rotated queries.
        target: Which heads are disturbed.
        noise: Source of the noise; torch's global generator unless given.

    Raises:
        InputError: ``std`` is negative, or there are no such heads.
    """
    if not std >= 0:
        raise InputError(f"noise std is {std}; it must be at least 0")
    kinds = {"real": 0.0, "imaginary": -90.0}
    chosen = {kind: phase for kind, phase in kinds.items() if target in (kind, "both")}
    heads = {
        kind: [h for h, head in enumerate(model.layout.heads) if head.phase == phase]
        for kind, phase in chosen.items()
    }
    if not chosen or not any(heads.values()):
        raise InputError(f"noise target is {target!r}; the model has no heads of that kind")
    handles = [
        block.self_attn.position.register_forward_hook(_hook(layer, std, heads, noise))
        for layer, block in enumerate(model.blocks())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    layer: int, std: float, heads: dict[str, list[int]], noise: NoiseSource | None
) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    def add(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = output
        q = q.clone()
        for kind, own in heads.items():
            shape = q[:, :, own].shape
            unit = (
                torch.randn(shape, device=q.device) if noise is None else noise(kind, layer, shape)
            )
            q[:, :, own] += (std * unit).to(q.dtype)
        return q, k

    return add
