"""Parameters, cache and floating-point operations of a model, from its sizes."""

from ropepp.model.transformer import Transformer


def num_parameters(model: Transformer) -> int:
    """Trained parameters; tied matrices count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def kv_cache_bytes_per_token(model: Transformer) -> int:
    """Keys and values of one token in all layers, in bfloat16."""
    config = model.config
    return 2 * 2 * config.num_layers * model.layout.num_kv_heads * config.head_dim


def training_flops(model: Transformer, tokens: int, attended_pairs: int) -> int:
    """Model FLOPs of forward and backward over ``tokens``, causal, without embedding lookup and
    norms: 6 per weight and token for the matrices, 12 D per pair and attention head for scores and
    mixing. ``attended_pairs`` are (query, visible key), a token seeing itself: T (T + 1) / 2 for a
    document of T tokens, which is the sum of its positions + 1."""
    config, layout = model.config, model.layout
    heads = layout.num_projections + 2 * layout.num_kv_heads + layout.num_heads
    attention_weights = config.hidden_size * config.head_dim * heads
    block = attention_weights + 3 * config.hidden_size * config.ffn_size
    matrices = config.num_layers * block + config.hidden_size * config.vocab_size
    mixing = config.num_layers * layout.num_heads * config.head_dim
    return 6 * matrices * tokens + 12 * mixing * attended_pairs
