"""Fourier position embedding (FoPE, arXiv 2412.17739).

A rotating pair of components turns by a mixture of frequencies instead of one: its cos and sin are
fixed random combinations, close to the identity, of those of the basis frequencies. Frequencies too
slow to complete a turn within the maximal length are dropped.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.heads import HeadLayout
from ropepp.model.init import normal
from ropepp.model.positions.base import Position, PositionLayer, Table
from ropepp.model.positions.rotary import RotaryLayer
from ropepp.model.positions.scaling import Scaling

MOST_BASIS = 2**14  # frequencies, twice


class FoPELayer(RotaryLayer):
    """Mixes the basis for each kv head and rotates key and queries with the result. The constants
    ``sin_coef`` and ``cos_coef`` (K, D_in, D_out) are drawn at initialisation and saved."""

    sin_coef: Tensor
    cos_coef: Tensor

    def __init__(
        self, layout: HeadLayout, head_dim: int, basis: int, gain: float, magnitude: float
    ) -> None:
        super().__init__(layout, head_dim, head_dim)
        self.gain = gain
        self.magnitude = magnitude
        shape = (layout.num_kv_heads, basis, min(basis, head_dim // 4))
        self.register_buffer("sin_coef", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("cos_coef", torch.empty(shape, dtype=torch.float32))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal around a selection of every ceil(D_in / D_out)-th basis frequency."""
        K, D_in, D_out = shape
        value = normal(shape, self.gain * math.sqrt(2.0 / (D_in * D_out + K * D_out)), generator)
        step = math.ceil(D_in / D_out)
        columns = torch.arange(math.ceil(D_in / step))
        value[:, columns * step, columns] += 1.0
        return value

    def forward(self, q_BTPD: Tensor, k_BTKD: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """See `PositionLayer`; ``table`` is (cos, sin), each (B or 1, T, D_in) in float32."""
        cos, sin = self.mix(table[0], self.cos_coef), self.mix(table[1], self.sin_coef)
        G = q_BTPD.shape[-2] // k_BTKD.shape[-2]
        cos_q, sin_q = (part.repeat_interleave(G, dim=-2) for part in (cos, sin))
        return self.queries(q_BTPD, cos_q, sin_q), self.keys(k_BTKD, cos, sin)

    def mix(self, basis: Tensor, coefficients: Tensor) -> Tensor:
        """(B or 1, T, D_in) to (B or 1, T, K, D/2); columns beyond D_out are the constant 1."""
        mixed = torch.einsum("bti,kio->btko", basis, coefficients.float())
        missing = self.head_dim // 2 - mixed.shape[-1]
        return self.magnitude * F.pad(mixed, (0, missing), value=1.0)


@dataclass(frozen=True)
class FoPE(Position):
    """Fourier position embedding.

    Args:
        theta: Base of the frequencies.
        max_length: Tokens within which a frequency must complete a turn, or it is dropped.
        basis_size: Size of a head whose frequencies make the basis; a larger head takes its own.
        gain: Scale of the random part of the coefficients.
        scaling: Context extension of the frequencies that were not dropped, if any.
    """

    theta: float = 10000.0
    max_length: int = 4096
    basis_size: int = 128
    gain: float = 0.3
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not self.theta > 1 or self.max_length < 7 or not 2 <= self.basis_size <= MOST_BASIS:
            raise InputError(
                f"FoPE got theta {self.theta}, max_length {self.max_length}, basis_size "
                f"{self.basis_size}: needs theta above 1, max_length from 7, basis_size 2 to "
                f"{MOST_BASIS:,}"
            )

    def num_frequencies(self, head_dim: int) -> int:
        """Number of frequencies theta^(-2j/D) that are at least 2 pi / max_length (D_in)."""
        size = max(self.basis_size, head_dim)
        floor = 2.0 * math.pi / self.max_length
        return sum(self.theta ** (-2.0 * j / size) >= floor for j in range(size // 2))

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """The basis, (D_in,), float32."""
        size = max(self.basis_size, head_dim)
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        frequencies = (1.0 / self.theta**exponents)[: self.num_frequencies(head_dim)]
        return self.scaling.frequencies(frequencies) if self.scaling else frequencies

    def table(self, positions_BT: Tensor, config: ModelConfig) -> Table:
        frequencies = self.frequencies(config.head_dim, positions_BT.device)
        angles = positions_BT.unsqueeze(-1).float() * frequencies
        return angles.cos(), angles.sin()

    def build(self, config: ModelConfig, layer_index: int) -> PositionLayer:
        if config.head_dim % 4:
            raise InputError(f"FoPE needs a head size divisible by 4, found {config.head_dim}")
        layout = self.layout(config.num_heads, config.num_kv_heads)
        magnitude = self.scaling.magnitude if self.scaling else 1.0
        basis = self.num_frequencies(config.head_dim)
        return FoPELayer(layout, config.head_dim, basis, self.gain, magnitude)
