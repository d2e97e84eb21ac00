"""Gaussian noise on rotated queries: which kind of head does a model rely on?

The hooks sit on the position layers and cost nothing once removed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ropepp.errors import InputError
from ropepp.model.heads import HeadLayout
from ropepp.model.transformer import Transformer

# (kind, layer, shape of the queries of that kind (B, T, heads, D)) -> standard normal noise
NoiseSource = Callable[[str, int, torch.Size], Tensor]
Kind = Literal["real", "imaginary"]
PHASES: dict[Kind, float] = {"real": 0.0, "imaginary": -90.0}  # degrees


class UnitNoise:
    """Standard normal noise that depends on a seed, the layer and the number of the forward pass
    alone.

    It is the same for every standard deviation, and for real and imaginary heads where a layer has
    as many of both: what noise does to the two kinds is then paired. One object serves one
    evaluation; the next one gets a new object.

    Args:
        seed: Numbers from 0 on that name the draw.
    """

    def __init__(self, *seed: int) -> None:
        self.seed = seed
        self._passes: Counter[tuple[str, int]] = Counter()

    def __call__(self, kind: str, layer: int, shape: torch.Size) -> Tensor:
        entropy = [*self.seed, layer, self._passes[kind, layer]]
        self._passes[kind, layer] += 1
        state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        # On the CPU: the same numbers whatever the model's device.
        return torch.randn(shape, generator=torch.Generator().manual_seed(state >> 1))


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
    heads: dict[str, list[int]] = {
        kind: found
        for kind, found in noise_heads(model.layout).items()
        if target in (kind, "both") and found
    }
    if not heads:
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


def noise_heads(layout: HeadLayout) -> dict[Kind, list[int]]:
    """Indices of a layer's real and imaginary heads."""
    return {
        kind: [h for h, head in enumerate(layout.heads) if (head.phase - phase) % 360 == 0]
        for kind, phase in PHASES.items()
    }


def noise_study(
    model: Transformer,
    measure: Callable[[], Mapping[str, float]],
    stds: Sequence[float],
    draws: int,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, dict[tuple[Kind, float], dict[int, float]]]]:
    """Measures a model without noise, and with noise of each strength on each kind of head.

    Args:
        model: A model with real and imaginary heads.
        measure: Evaluates the model as it is when called; the same forward passes in the same order
            every time, or the draws are not paired.
        stds: Standard deviations, in units of the rotated queries.
        draws: Noises that are tried for each.
        seed: Seed of the noises.

    Returns:
        The metrics without noise, and for each metric its values by kind and standard deviation,
        each by the draw's number.

    Raises:
        InputError: The model lacks a kind of head, a standard deviation is negative or given twice,
            or there are fewer than 2 draws, of which no interval follows.
    """
    if draws < 2:
        raise InputError(f"draws is {draws}; an interval needs at least 2")
    if not stds or min(stds) < 0 or len(set(stds)) < len(stds):
        raise InputError(f"stds are {list(stds)}; allowed are numbers from 0 on, each once")
    for kind, heads in noise_heads(model.layout).items():
        if not heads:
            raise InputError(
                f"the position is {type(model.position).__name__}, which has no {kind} heads: noise"
                " compares real and imaginary heads, as RoPE++ (RoPEppEC, RoPEppEH) has them"
            )
    clean = dict(measure())
    values: dict[str, dict[tuple[Kind, float], dict[int, float]]] = {key: {} for key in clean}
    for draw in range(draws):
        for std in stds:
            for kind in PHASES:
                with noisy_queries(model, std, kind, UnitNoise(seed, draw)):
                    found = measure()
                for key, value in found.items():
                    values[key].setdefault((kind, std), {})[draw] = value
    return clean, values


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
            q[:, :, own] += (std * unit).to(q.device, q.dtype)
        return q, k

    return add
