"""The decoder: embedding, pre-norm blocks, final norm, output layer (Llama-shaped)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropepp.errors import InputError
from ropepp.model.attention import Attention, Linear, RMSNorm
from ropepp.model.cache import KVCache, LayerCache
from ropepp.model.config import ModelConfig
from ropepp.model.documents import find_documents
from ropepp.model.init import initialize
from ropepp.model.loss import IGNORE_INDEX, cross_entropy_and_hits, cross_entropy_sum
from ropepp.model.positions.base import Position, Table


class Embedding(nn.Module):
    """A table of one vector a token id."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.ffn_size)
        self.up_proj = Linear(config.hidden_size, config.ffn_size)
        self.down_proj = Linear(config.ffn_size, config.hidden_size)

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTM)) * self.up_proj(x_BTM))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, position: Position, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, position, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BTM: Tensor,
        table: Table,
        cu_seqlens: Tensor | None = None,
        visible: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(x_BTM)
        x_BTM = x_BTM + self.self_attn(normed, table, cu_seqlens, visible, cache)
        return x_BTM + self.mlp(self.post_attention_layernorm(x_BTM))


class Transformer(nn.Module):
    """A causal language model with any position encoding.

    Args:
        config: Sizes.
        position: The spec of the position encoding.
        seed: Seed of the initial weights, see `ropepp.model.init`; on the meta device none are
            drawn.
        compute_dtype: Dtype of activations and matrix products; the weights' own unless given.
            Rotations, norms' statistics, softmax and loss are float32 in any case.
        ignore_index: Target that does not count in `loss`.

    Raises:
        InputError: Sizes and position do not fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        position: Position,
        *,
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.config = config
        self.position = position
        self.layout = position.layout(config.num_heads, config.num_kv_heads)
        self.compute_dtype = compute_dtype
        self.ignore_index = ignore_index
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, position, index) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie()
        if not self.embed_tokens.weight.is_meta:
            self.initialize(seed)

    def tie(self) -> None:
        """Makes the output layer share the embedding matrix, if it should.

        To be called again after what gives each its own, such as ``to_empty``.
        """
        if self.config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, seed: int) -> None:
        """Draws all weights anew, in place; also after ``to_empty`` of a model built on the meta
        device."""
        self.tie()
        initialize(self, seed, self.config.init_std)

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, M); arguments as in `forward`."""
        B, T = input_ids.shape
        for name, given in (("positions", positions), ("document_ids", document_ids)):
            if given is not None and given.shape != (B, T):
                raise InputError(
                    f"{name} is {tuple(given.shape)}; it must be {(B, T)} as input_ids"
                )
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + T, device=input_ids.device).unsqueeze(0)
        order = cu_seqlens = visible = None
        if cache is not None:
            visible = cache.visible(document_ids, B, T)
        elif document_ids is not None:
            cu_seqlens, order = find_documents(document_ids)
        if order is not None:
            input_ids = input_ids.gather(1, order)
            positions = positions.expand(B, T).gather(1, order)
        x_BTM = self.embed_tokens(input_ids)
        if self.compute_dtype is not None:
            x_BTM = x_BTM.to(self.compute_dtype)
        table = self.position.table(positions, self.config)
        layers = cache.layers if cache is not None else [None] * len(self.layers)
        for block, layer_cache in zip(self.layers, layers, strict=True):
            x_BTM = block(x_BTM, table, cu_seqlens, visible, layer_cache)
        x_BTM = self.norm(x_BTM)
        if order is not None:
            x_BTM = x_BTM.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(x_BTM))
        return x_BTM

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64; 0..T-1 unless given.
            document_ids: (B, T) int64; a token sees only tokens with its own id in its row. -1 is
                padding, seen by nobody else.
            cache: Tokens read before, to which these are added; positions then go on from there
                unless given.

        Returns:
            (B, T, V) in the compute dtype.
        """
        return self.lm_head(self.hidden(input_ids, positions, document_ids, cache))

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross entropy and number of targets, without the logits of all tokens.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token after each input, or ``ignore_index``.
            positions: See `forward`.
            document_ids: See `forward`.

        Returns:
            The sum in nats, float32, and the count, int64; the mean is for the caller, who knows
            what other processes and micro-batches add. Under FSDP2 this method must be registered
            as a forward method.
        """
        hidden = self.hidden(input_ids, positions, document_ids)
        total = cross_entropy_sum(hidden, self.lm_head.weight, targets, self.ignore_index)
        return total, (targets != self.ignore_index).sum()

    def evaluate(
        self,
        input_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `loss` without gradient; also the number of targets that are the likeliest token."""
        hidden = self.hidden(input_ids, positions, document_ids)
        weight, ignored = self.lm_head.weight, self.ignore_index
        total, hits = cross_entropy_and_hits(hidden, weight, targets, ignored)
        return total, (targets != ignored).sum(), hits

    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def set_backend(self, backend: str) -> None:
        """Chooses the attention backend of all layers, see `ropepp.model.kernels.attention`."""
        for layer in self.blocks():
            layer.self_attn.backend = backend
