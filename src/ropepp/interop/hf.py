"""The model as a class of transformers, for every variant. Imports transformers: import it late.

It is transformers' own Llama with another attention, so that what works for a Llama works for it:
masks, caches, packed rows, generation, LoRA, compilation. Importing this module lets transformers'
Auto classes open exported folders without code of theirs.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

from ropepp.interop.settings import FORMS, MODELING, outer_name, own_settings, sizes
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import OWN_TYPE, architecture
from ropepp.model.loss import IGNORE_INDEX
from ropepp.model.positions import Position
from ropepp.model.transformer import Transformer

# Named past_key_values before transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RoPEppConfig(PretrainedConfig):
    """Sizes and position encoding as plain values: ``network``, the fields of `ModelConfig`, and
    ``position``, with ``class_path`` and ``init_args``. ``ignore_index`` is a label that does not
    count in the loss, besides -100."""

    model_type = OWN_TYPE
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012 (as the base class has it)

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        position: dict[str, Any] | None = None,
        ignore_index: int = IGNORE_INDEX,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"pad_token_id": None, **kwargs})
        self.network = network
        self.position = position
        self.ignore_index = ignore_index
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.auto_map = dict(FORMS[OWN_TYPE]["auto_map"])
        # What a Llama's feed-forward and attention layers ask for.
        self.hidden_act, self.mlp_bias, self.attention_bias = "silu", False, False
        self.attention_dropout = 0.0
        if network is not None:
            config, spec = self._parts(kwargs)
            layout = spec.layout(config.num_heads, config.num_kv_heads)
            for name, value in sizes(config, layout).items():
                setattr(self, name, value)

    def parts(self) -> tuple[ModelConfig, Position]:
        """Sizes and position encoding, made from the plain values."""
        return self._parts(vars(self))

    def _parts(self, sizes: dict[str, Any]) -> tuple[ModelConfig, Position]:
        given = {"model_type": OWN_TYPE, "network": self.network, "position": self.position}
        return architecture({**sizes, **given}, Path("config.json"))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Leaves the code that saved folders carry to `RoPEppForCausalLM.save_pretrained`."""


class RoPEppAttention(nn.Module):
    """`ropepp.model.attention.Attention` over transformers' kernels, masks and caches."""

    def __init__(self, config: RoPEppConfig, layer_idx: int) -> None:
        super().__init__()
        network, spec = config.parts()
        layout = spec.layout(network.num_heads, network.num_kv_heads)
        M, D = network.hidden_size, network.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, D
        # What the kernels look up.
        self.num_key_value_groups = layout.num_heads // layout.num_kv_heads
        self.scaling, self.is_causal = D**-0.5, True
        self.q_proj = nn.Linear(M, layout.num_projections * D, bias=False)
        self.k_proj = nn.Linear(M, layout.num_kv_heads * D, bias=False)
        self.v_proj = nn.Linear(M, layout.num_kv_heads * D, bias=False)
        self.o_proj = nn.Linear(layout.num_heads * D, M, bias=False)
        norm = (lambda: llama.LlamaRMSNorm(D, network.norm_eps)) if network.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.position = spec.build(network, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, ...] = (),
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See transformers' ``LlamaAttention``; ``position_embeddings`` is the spec's table."""
        cache = past_key_values if cache is None else cache
        q_BTPD, k_BTKD, v_BTKD = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.position(self.q_norm(q_BTPD), self.k_norm(k_BTKD), position_embeddings)
        q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q, k, v_BTKD))
        # A static cache counts in place.
        begin = cache.get_seq_length(self.layer_idx) + 0 if cache is not None else 0
        if cache is not None:
            places = {"cache_position": kwargs.get("cache_position")}  # before version 5
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD, self.layer_idx, places)
        slopes = self.position.alibi_slopes(position_embeddings)
        if slopes is not None:
            attention_mask = with_slopes(attention_mask, slopes, begin, q_BHTD, k_BKTD.shape[2])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        out_BTHD, weights = attend(
            self, q_BHTD, k_BKTD, v_BKTD, attention_mask, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out_BTHD.flatten(-2)), weights


def with_slopes(
    mask: Tensor | None, slopes_H: Tensor, begin: int | Tensor, q_BHTD: Tensor, S: int
) -> Tensor:
    """ALiBi as a mask added to scores, (B or 1, H, T, S), of queries from place ``begin`` on;
    ``mask`` is transformers' own, (B, 1, T, S), bool or added to scores, causal if None."""
    keys = torch.arange(S, device=q_BHTD.device)
    distance = (torch.arange(q_BHTD.shape[2], device=q_BHTD.device) + begin).unsqueeze(-1) - keys
    bias = -slopes_H[:, None, None] * distance
    hidden = torch.finfo(q_BHTD.dtype).min
    if mask is None:
        mask = distance >= 0
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, hidden).to(q_BHTD.dtype).view(-1, *bias.shape)
    return (bias + mask).clamp(min=hidden).to(q_BHTD.dtype)


class PositionTable(nn.Module):
    """What a position encoding computes once for all layers."""

    def __init__(self, config: RoPEppConfig) -> None:
        super().__init__()
        self.network, self.spec = config.parts()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return self.spec.table(position_ids, self.network)


class RoPEppDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, config: RoPEppConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        self.self_attn = RoPEppAttention(config, layer_idx)  # type: ignore[assignment]


class RoPEppPreTrainedModel(llama.LlamaPreTrainedModel):
    """What both classes below state of themselves."""

    config_class = RoPEppConfig
    config: RoPEppConfig  # type: ignore[assignment]
    _no_split_modules = ["RoPEppDecoderLayer"]  # noqa: RUF012 (as the base class has it)
    _supports_flash_attn = False  # which knows no slopes
    _supports_flex_attn = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RoPEppDecoderLayer,
        "attentions": RoPEppAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        draw = getattr(module, "initial_value", None)
        for name, buffer in module.named_buffers(recurse=False):
            if draw is not None and not getattr(buffer, "_is_hf_initialized", False):
                buffer.copy_(draw(name, buffer.shape, torch.default_generator))


class RoPEppModel(RoPEppPreTrainedModel, llama.LlamaModel):
    """A `Transformer` without its output layer."""

    def __init__(self, config: RoPEppConfig) -> None:
        super(llama.LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            RoPEppDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PositionTable(config)  # type: ignore[assignment]
        self.gradient_checkpointing = False
        # FoPE's constants stay as they were drawn.
        self._keep_in_fp32_modules_strict = {
            name.split(".")[-1] for name, _ in self.named_buffers()
        }
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """A Llama's, where padding does not move a row's own tokens: FoPE's angles are absolute."""
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            T = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class RoPEppForCausalLM(RoPEppPreTrainedModel, llama.LlamaForCausalLM):
    """A `Transformer` behind transformers' interface; padding is told by ``attention_mask``, and
    packed documents by ``position_ids`` that begin anew, as to a Llama."""

    _tp_plan = {}  # noqa: RUF012 (projections are shared by heads)

    def __init__(self, config: RoPEppConfig) -> None:
        super(llama.LlamaForCausalLM, self).__init__(config)
        self.model = RoPEppModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def loss_function(
        self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any
    ) -> Tensor:
        """A Llama's, where the configuration's ``ignore_index`` does not count either."""
        labels = labels.masked_fill(labels == self.config.ignore_index, IGNORE_INDEX)
        return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the file that loads the folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(MODELING, Path(save_directory) / MODELING.name)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """See `RoPEppConfig`."""


def wrapped(model: Transformer, max_length: int) -> RoPEppForCausalLM:
    """The same tensors for transformers, in evaluation mode; ``max_length``: a row's in tokens."""
    text = {"max_position_embeddings": max_length, "bos_token_id": None, "eos_token_id": None}
    config = RoPEppConfig.from_dict(own_settings(model, text))
    with torch.device("meta"):
        out = RoPEppForCausalLM(config)
    own = model.state_dict()
    out.load_state_dict({outer_name(name): tensor for name, tensor in own.items()}, assign=True)
    out.tie_weights()
    return out.eval()


AutoConfig.register(OWN_TYPE, RoPEppConfig, exist_ok=True)
AutoModel.register(RoPEppConfig, RoPEppModel, exist_ok=True)
AutoModelForCausalLM.register(RoPEppConfig, RoPEppForCausalLM, exist_ok=True)
