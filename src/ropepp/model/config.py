"""Sizes of a model: plain values, no behaviour.

Shape letters used in this package: B batch, T tokens (queries), S tokens (keys), H attention heads,
P query projections, K kv heads, G attention heads per kv head, D head size, M model width,
F feed-forward width, V vocabulary, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ropepp.errors import InputError
from ropepp.model.scale import MatrixScale

LARGEST = {  # sizes that somebody may mean: a file must not ask for what would never end
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_layers": 2**10,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "ffn_size": 2**20,
    "head_size": 2**14,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder before a position encoding rearranges its heads.

    Args:
        vocab_size: Number of token ids (V).
        hidden_size: Width of the residual stream (M).
        num_layers: Number of blocks (L).
        num_heads: Attention heads of the plain model; a position may project fewer or attend with
            more.
        num_kv_heads: Key/value heads of the plain model; divides ``num_heads``.
        ffn_size: Width of the gated feed-forward layer (F).
        head_size: Size of a head (D); ``hidden_size / num_heads`` unless given.
        norm_eps: Epsilon of every RMSNorm.
        tied_embeddings: Whether the output layer shares the embedding matrix.
        qk_norm: Whether queries and keys pass an RMSNorm of their own before the position encoding.
        init_std: Standard deviation of the initial weights.
        o_proj: Start and step of attention's output projection, wider where heads are doubled.
        down_proj: The same for the feed-forward layer's output (H / P is 1 there).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    head_size: int | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qk_norm: bool = False
    init_std: float = 0.02
    o_proj: MatrixScale = field(default_factory=MatrixScale)
    down_proj: MatrixScale = field(default_factory=MatrixScale)

    def __post_init__(self) -> None:
        for name in ("o_proj", "down_proj"):  # from a checkpoint or config.json: plain data
            given = getattr(self, name)
            if isinstance(given, Mapping):
                object.__setattr__(self, name, MatrixScale(**given))
        for name, most in LARGEST.items():
            value = getattr(self, name)
            optional = name == "head_size" and value is None
            if not optional and (type(value) is not int or not 1 <= value <= most):
                raise InputError(
                    f"{name} is {value!r}; it must be a whole number from 1 to {most:,}"
                )
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}; it must be a number, at least 0")
        for name in ("tied_embeddings", "qk_norm"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads is {self.num_heads}, num_kv_heads {self.num_kv_heads}: "
                "every kv head must serve the same number of heads"
            )
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                "give head_size"
            )

    @property
    def head_dim(self) -> int:
        """Size of a head (D)."""
        return self.head_size or self.hidden_size // self.num_heads
