"""The decoder: embedding, pre-norm blocks, final norm, output layer (Llama-shaped)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropepp.errors import InputError
from ropepp.model.attention import Attention, Linear, RMSNorm
from ropepp.model.cache import KVCache, LayerCache
from ropepp.model.config import ModelConfig
from ropepp.model.documents import Documents
from ropepp.model.init import initialize
from ropepp.model.kernels import Backend
from ropepp.model.loss import IGNORE_INDEX, cross_entropy_sum, token_losses
from ropepp.model.positions.base import Position, Table
from ropepp.model.scope import CAUSAL, AttentionScope, ContextParallelScope
from ropepp.model.sequence import SequenceGroup, check_length


class SwiGLU(nn.Module):
    """Gated feed-forward layer, down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.ffn_size)
        self.up_proj = Linear(config.hidden_size, config.ffn_size)
        rules, fan_in = config.down_proj, config.ffn_size / config.hidden_size
        std, step = (r.factor(1, fan_in, config.num_layers) for r in (rules.std, rules.step))
        self.down_proj = Linear(config.ffn_size, config.hidden_size, std, step)

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
        self.recompute = False

    def forward(
        self,
        x_BTM: Tensor,
        table: Table,
        scope: AttentionScope = CAUSAL,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BTM = x_BTM + self.self_attn(self.input_layernorm(x_BTM), table, scope, cache)
        return x_BTM + self.mlp(self.post_attention_layernorm(x_BTM))


class OutputLayer(Linear):
    """Hidden states to logits or losses; each use is a method, around which shards are gathered."""

    # Of the weight, where it is not its own: it sums over many tokens, shards are bfloat16.
    gradient_dtype: torch.dtype | None = None

    def loss(
        self, hidden_BTM: Tensor, targets_BT: Tensor, ignore_index: int, z_loss: float
    ) -> Tensor:
        """See `ropepp.model.loss.cross_entropy_sum`."""
        if self.gradient_dtype is not None:
            self.weight.grad_dtype = self.gradient_dtype
        return cross_entropy_sum(hidden_BTM, self.weight, targets_BT, ignore_index, z_loss)

    def evaluate(
        self, hidden_BTM: Tensor, targets_BT: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """See `ropepp.model.loss.token_losses`."""
        return token_losses(hidden_BTM, self.weight, targets_BT, ignore_index)


class Transformer(nn.Module):
    """A causal language model; an `InputError` if sizes and position encoding do not fit.

    Args:
        seed: Seed of the initial weights (`ropepp.model.init`), unless on the meta device.
        compute_dtype: Dtype of activations and matrix products; the weights' own unless given.
        ignore_index: Target that does not count in `loss`.
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
        self.z_loss = 0.0
        self.sequence: SequenceGroup | None = None  # the processes that share rows, if any
        table = torch.empty(config.vocab_size, config.hidden_size)  # drawn below
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, position, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size)
        self.tie()
        if not self.embed_tokens.weight.is_meta:
            self.initialize(seed)

    def tie(self) -> None:
        """Lets the output layer share the embedding, if it should; again after ``to_empty``."""
        if self.config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, seed: int) -> None:
        """Draws all weights anew, in place; also after ``to_empty`` of one on the meta device."""
        self.tie()
        initialize(self, seed, self.config.init_std)

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, M), see `forward`; of shared rows, the part."""
        B, T = input_ids.shape
        for name, given in (("positions", positions), ("document_ids", document_ids)):
            if isinstance(given, Tensor) and given.shape != (B, T):
                raise InputError(
                    f"{name} is {tuple(given.shape)}; it must be {(B, T)} as input_ids"
                )
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = torch.arange(start, start + T, device=input_ids.device).unsqueeze(0)
        scope = self._scope(input_ids, document_ids, cache)
        input_ids, positions = self.local_part(input_ids), self.local_part(positions)
        x_BTM = self.embed_tokens(input_ids)
        if self.compute_dtype is not None:
            x_BTM = x_BTM.to(self.compute_dtype)
        table = self.position.table(positions, self.config)
        layers = cache.layers if cache is not None else [None] * len(self.layers)
        for block, layer_cache in zip(self.blocks(), layers, strict=True):
            if block.recompute and torch.is_grad_enabled():
                x_BTM = checkpoint(
                    block, x_BTM, table, scope, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTM = block(x_BTM, table, scope, layer_cache)
        return self.norm(x_BTM)

    def _scope(
        self, input_ids: Tensor, document_ids: Tensor | Documents | None, cache: KVCache | None
    ) -> AttentionScope:
        """What all layers' queries see."""
        B, T = input_ids.shape
        documents, ids = None, None
        if isinstance(document_ids, Documents):
            if cache is not None:
                raise InputError("rows with a cache need ids of documents, not their boundaries")
            documents = document_ids
        elif cache is not None:
            ids = cache.documents(document_ids, B, T)
        elif document_ids is not None:
            ids = document_ids, document_ids
        if isinstance(document_ids, Tensor) and (cache is None or not cache.length):
            documents = Documents.from_ids(document_ids)
        if documents is not None:
            documents.check(B, T)
            ids = None
        if self.sequence is None:
            return AttentionScope(documents, ids)
        check_length(T, self.sequence.size)
        if ids is not None or cache is not None:
            raise InputError(
                "rows shared by several processes need contiguous documents and no cache"
            )
        return ContextParallelScope(self.sequence, documents, T)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token, (B, T, V) in the compute dtype.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64; 0..T-1 unless given.
            document_ids: (B, T) int64; a token sees only tokens with its own id in its row. -1 is
                padding, seen by nobody else. Or `Documents`, for which no device is waited.
            cache: Tokens read before, to which these are added; positions go on from there.
        """
        return self.lm_head(self.hidden(input_ids, positions, document_ids, cache))

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross entropy in nats, float32, and number of targets, int64, without the logits
        of all tokens; the mean is for the caller, who knows what other processes and micro-batches
        add. ``targets`` are (B, T) int64, the token after each input, or ``ignore_index``; others
        are as in `forward`. FSDP2 must know it as a forward method. With ``z_loss`` the gradient
        has that term too, see `ropepp.model.loss.cross_entropy_sum`."""
        hidden = self.hidden(input_ids, positions, document_ids)
        targets = self.local_part(targets)
        total = self.lm_head.loss(hidden, targets, self.ignore_index, self.z_loss)
        return total, (targets != self.ignore_index).sum()

    def evaluate(
        self,
        input_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each token's cross entropy (B, T) float32 in nats and whether its target is the likeliest
        (B, T); 0 and False without a target, no gradient. Of shared rows the `local_part`."""
        hidden = self.hidden(input_ids, positions, document_ids)
        return self.lm_head.evaluate(hidden, self.local_part(targets), self.ignore_index)

    def local_part(self, x_BT: Tensor) -> Tensor:
        """This process's part (B, T / n) of rows that n processes share; otherwise all of it."""
        return x_BT if self.sequence is None else self.sequence.split(x_BT)

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def set_recompute(self, every: int) -> None:
        """Activation checkpointing (arXiv 1604.06174) of every n-th block; 0 is none of them."""
        for index, block in enumerate(self.blocks()):
            block.recompute = every > 0 and index % every == 0

    def set_backend(self, backend: str | Backend) -> None:
        """Chooses the attention backend of all layers, see `ropepp.model.kernels.attention`."""
        for layer in self.blocks():
            layer.self_attn.backend = backend
