"""The model as a class of transformers, for every variant. Imports transformers: import it late.

Importing this module lets transformers' Auto classes open exported folders without code of theirs.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ropepp.errors import InputError
from ropepp.interop.settings import AUTO_MAP, sizes
from ropepp.model.cache import KVCache
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import OWN_TYPE, architecture
from ropepp.model.loss import IGNORE_INDEX
from ropepp.model.positions import Position
from ropepp.model.transformer import Transformer

MODELING = Path(__file__).with_name("modeling_ropepp.py")
# Named past_key_values before transformers 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RoPEppConfig(PretrainedConfig):
    """Sizes and position encoding as plain values.

    Args:
        network: The fields of `ModelConfig`.
        position: A position encoding as ``class_path`` and ``init_args``.
        ignore_index: Label that does not count in the loss, besides -100.
        max_position_embeddings: Longest row in tokens that the model was made for.
        use_cache: Whether a forward pass in evaluation mode returns a cache.
    """

    model_type = OWN_TYPE
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = (CACHE,)

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        position: dict[str, Any] | None = None,
        ignore_index: int = IGNORE_INDEX,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = network
        self.position = position
        self.ignore_index = ignore_index
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.auto_map = dict(AUTO_MAP)
        if network is not None:
            config, spec = self.parts()
            layout = spec.layout(config.num_heads, config.num_kv_heads)
            for name, value in sizes(config, layout).items():
                setattr(self, name, value)

    def parts(self) -> tuple[ModelConfig, Position]:
        """Sizes and position encoding, made from the plain values."""
        plain = {"model_type": OWN_TYPE, "network": self.network, "position": self.position}
        return architecture(plain, Path("config.json"))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Leaves the code that saved folders carry to `RoPEppForCausalLM.save_pretrained`."""


class RoPEppForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer` behind transformers' interface; padding is told by ``attention_mask``."""

    config_class = RoPEppConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as the base class has it)
    _tied_weights_keys = {  # noqa: RUF012
        "network.lm_head.weight": "network.embed_tokens.weight"
    }

    def __init__(self, config: RoPEppConfig) -> None:
        super().__init__(config)
        self.network = Transformer(*config.parts(), ignore_index=config.ignore_index)
        self.gradient_checkpointing = False
        self.post_init()
        # FoPE's; said here because before version 5 the class may name parameters alone.
        self._keep_in_fp32_modules_strict = {"sin_coef", "cos_coef"}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, and the loss if there are labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S + T), 0 at padding, S the number of cached tokens.
            position_ids: (B, T) or (1, T); a row's own tokens are counted unless given.
            cache: What was read before; is added to.
            labels: (B, T), the input ids themselves: label t + 1 is the target of token t. -100 and
                the configuration's ``ignore_index`` do not count.
            use_cache: Whether to return a cache; by default in evaluation mode.
            logits_to_keep: Logits of so many last tokens alone, or of those at given places; 0 is
                all.
            past_key_values: Older name of ``cache``.
            return_dict: False returns a tuple.
            kwargs: ``num_items_in_batch`` divides the summed loss.

        Raises:
            InputError: Something is asked for that the model has not.
        """
        for name in ("inputs_embeds", "output_attentions", "output_hidden_states"):
            given = kwargs.get(name)
            if given is not None and given is not False:
                raise InputError(f"{name} is given; a ropepp model takes ids and returns logits")
        cache = self._chosen_cache(past_key_values if cache is None else cache, use_cache)
        B, T = input_ids.shape
        S = int(cache.get_seq_length()) if cache is not None else 0
        documents, positions = _padding(attention_mask, B, S, T)
        if position_ids is not None:
            positions = position_ids.expand(B, T)
        view = CacheView(cache, len(self.network.layers), documents) if cache is not None else None
        own = documents[:, S:] if documents is not None else None
        hidden = self.network.hidden(input_ids, positions, own, cast(KVCache | None, view))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.network.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.ignore_index, IGNORE_INDEX)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if cache is not None:
            output[CACHE] = cache
        return output.to_tuple() if return_dict is False else output

    def _chosen_cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            if given is not None:
                raise InputError("a cache is given, which activation checkpointing cannot use")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return DynamicCache(config=self.config) if given is None and use_cache else given

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """What `forward` gets with a static cache: the mask of padding as it is."""
        return attention_mask

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.network.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network has drawn its weights, unless they are about to be loaded."""

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """The network has its own way to compute again, with the same gradients."""
        self.gradient_checkpointing = enable
        self.network.set_recompute(every_n_layers if enable else 0)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the file that loads the folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(MODELING, Path(save_directory) / MODELING.name)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """See `RoPEppConfig`."""


class CacheView:
    """A cache of transformers as `Transformer.hidden` uses one.

    Args:
        cache: Holds keys and values as (B, K, S, D).
        num_layers: Number of blocks.
        document_ids: (B, S + T), -1 at padding, of all tokens with the next ones; None if none is
            padding.
    """

    def __init__(self, cache: Cache, num_layers: int, document_ids: Tensor | None) -> None:
        self.length = int(cache.get_seq_length())
        self.layers = [LayerView(cache, index, self.length) for index in range(num_layers)]
        self._document_ids = document_ids

    def documents(
        self, document_ids_BT: Tensor | None, B: int, T: int
    ) -> tuple[Tensor, Tensor] | None:
        """See `KVCache.documents`."""
        if document_ids_BT is None or self._document_ids is None:
            return None
        return document_ids_BT, self._document_ids


class LayerView:
    """One layer of a `CacheView`, to which tokens are added once."""

    def __init__(self, cache: Cache, index: int, length: int) -> None:
        self._cache = cache
        self._index = index
        self._length = length

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerCache.append`."""
        k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        end = self._length + k_BKTD.shape[2]
        # A static cache before version 5 does not know by itself where it ends.
        places = {"cache_position": torch.arange(self._length, end, device=k_BKTD.device)}
        k_BKSD, v_BKSD = self._cache.update(k_BKTD, v_BKTD, self._index, places)
        # A static cache returns all its room.
        return k_BKSD[:, :, :end].transpose(1, 2), v_BKSD[:, :, :end].transpose(1, 2)


def _padding(
    attention_mask: Tensor | None, B: int, S: int, T: int
) -> tuple[Tensor | None, Tensor | None]:
    """Document ids (B, S + T) and positions (B, T) of rows with padding; None without."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape != (B, S + T):
        raise InputError(
            f"attention_mask is {tuple(attention_mask.shape)}; it must be {(B, S + T)}: 0 at "
            "padding, cached tokens counted"
        )
    documents = (attention_mask != 0).long() - 1
    if not bool(documents.any()):
        return None, None
    return documents, ((documents + 1).cumsum(1) - 1).clamp(min=0)[:, S:]


AutoConfig.register(OWN_TYPE, RoPEppConfig, exist_ok=True)
AutoModelForCausalLM.register(RoPEppConfig, RoPEppForCausalLM, exist_ok=True)
