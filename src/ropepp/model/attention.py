"""Projections, position encoding, kernel, output projection: the one path of every variant."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ropepp.model.cache import LayerCache
from ropepp.model.config import ModelConfig
from ropepp.model.kernels import Backend
from ropepp.model.positions.base import Position, Table
from ropepp.model.scope import CAUSAL, AttentionScope


class Linear(nn.Module):
    """A matrix without bias, kept in its own dtype and applied in its input's.

    With float32 weights and bfloat16 activations this is mixed precision, defined without autocast
    and thus the same on one device and on shards that were gathered in bfloat16. ``std`` is in
    units of the model's ``init_std``, ``step`` of the optimizer's learning rate.
    """

    drawn: list[int] | None = None  # columns drawn at first, the others being zero; None: all

    def __init__(
        self, in_features: int, out_features: int, std: float = 1.0, step: float = 1.0
    ) -> None:
        super().__init__()
        self.std, self.step = std, step
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Statistics in float32, cast to the input's dtype, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.ones(shape)

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """With x' = x / rms(x) and g the gradient of the output: the gradient of x is
    (g w - x' mean(g w x')) / rms(x), in float32 and in few passes, from ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        # Weight and its gradient rounded as those of shards that were gathered in x's dtype.
        w, g, normed = weight.to(x.dtype).float(), grad.float(), x.float() * inverse
        products = (g * normed).reshape(-1, x.shape[-1])
        mean = (products @ w).div_(len(w)).view_as(inverse)
        of_x = torch.mul(g, w).addcmul_(normed, mean, value=-1).mul_(inverse)
        return of_x.to(x.dtype), products.sum(0).to(x.dtype).to(weight.dtype), None


class Attention(nn.Module):
    """Grouped-query attention over the heads of a position's layout."""

    def __init__(self, config: ModelConfig, position: Position, layer_index: int) -> None:
        super().__init__()
        layout = position.layout(config.num_heads, config.num_kv_heads)
        M, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.backend: str | Backend = "auto"
        self.q_proj = Linear(M, layout.num_projections * D)
        self.k_proj = Linear(M, layout.num_kv_heads * D)
        self.v_proj = Linear(M, layout.num_kv_heads * D)
        drawn = position.drawn(layout)
        # What adds to the residual stream at first is the heads that are drawn.
        heads = ((config.o_proj.std, len(drawn)), (config.o_proj.step, layout.num_heads))
        std, step = (
            rule.factor(H / layout.num_projections, H * D / M, config.num_layers)
            for rule, H in heads
        )
        self.o_proj = Linear(layout.num_heads * D, M, std, step)
        self.o_proj.drawn = [h * D + i for h in drawn for i in range(D)]
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.position = position.build(config, layer_index)

    def forward(
        self,
        x_BTM: Tensor,
        table: Table,
        scope: AttentionScope = CAUSAL,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Mixes tokens of normed hidden states; ``table`` is the position spec's for all layers."""
        q_BTPD, k_BTKD, v_BTKD = (
            proj(x_BTM).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHD, k_BTKD = self.position(self.q_norm(q_BTPD), self.k_norm(k_BTKD), table)
        options = {"alibi_slopes": self.position.alibi_slopes(table), "backend": self.backend}
        out_BTHD = scope.attend(q_BTHD, k_BTKD, v_BTKD, cache, **options)
        return self.o_proj(out_BTHD.flatten(-2))
