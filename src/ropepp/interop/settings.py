"""What ``config.json`` says of a model in each form: the inverse of
`ropepp.model.folders.published`.

What it says of the text comes from elsewhere: ``max_position_embeddings``, the longest row in
tokens that the model was made for, and ``bos_token_id`` and ``eos_token_id``, which begin and end a
document, or None.
"""

from dataclasses import asdict
from typing import Any

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import FOURIER_SETTINGS, IMAGINARY_MODES, OWN_TYPE, position
from ropepp.model.heads import HeadLayout
from ropepp.model.plain import to_plain
from ropepp.model.positions import PI, ALiBi, FoPE, Position, Pythia, RoPE, YaRN
from ropepp.model.transformer import Transformer

AUTO_MAP = {
    "AutoConfig": "modeling_ropepp.RoPEppConfig",
    "AutoModelForCausalLM": "modeling_ropepp.RoPEppForCausalLM",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
}
# What published FoPE models state besides the settings on which loading insists.
FOURIER = {
    **FOURIER_SETTINGS,
    "fourier": True,
    "fourier_init": "eye_xavier_norm",
    "init_device": "cpu",
    "len_extra": False,
    "rope_clamp_to_linear": False,
    "rope_clamp_to_linear_mode": "ceil",
    "rope_clamp_upper_freq": False,
    "rope_clamp_upper_to_zero": True,
    "rope_floor_freq_ratio": 1.0,
    "rope_full_precision": True,
    "rope_include_neg_freq": False,
    "rope_init_distribution": "exponential",
    "rope_init_floor_freq": 0.0,
    "rope_init_upper_freq": 1.0,
    "rope_learnable": False,
    "rope_no_pos": False,
    "rope_no_repetition": False,
    "rope_no_rotary": False,
    "rope_upper_freq_ratio": 1.0,
    "rope_zero_freq_ratio": -1.0,
}


def sizes(config: ModelConfig, heads: ModelConfig | HeadLayout) -> dict[str, Any]:
    """Sizes by their customary names, with the numbers of heads of a layout or of a plain Llama."""
    return {
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "vocab_size": config.vocab_size,
    }


def own_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of any variant, for transformers with this package installed."""
    return {
        "architectures": ["RoPEppForCausalLM"],
        "auto_map": AUTO_MAP,
        "ignore_index": model.ignore_index,
        "model_type": OWN_TYPE,
        "network": asdict(model.config),
        "position": to_plain(model.position),
        "use_cache": True,
        **sizes(model.config, model.layout),
        **text,
    }


def llama_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any] | None:
    """``config.json`` of an ordinary Llama; None if the model is none.

    YaRN becomes "llama3", whose weights need `RoPE`'s magnitude folded in.
    """
    config, spec = model.config, model.position
    if type(spec) is not RoPE or spec.rotary_share != 1 or config.qk_norm:
        return None
    if config.hidden_size % config.num_heads:  # which transformers refuses
        return None
    rope: dict[str, Any] | None = None
    length = text["max_position_embeddings"]
    match spec.scaling:
        case None:
            pass
        case PI(factor=factor):
            rope = {"rope_type": "linear", "factor": factor}
        case YaRN(slow=slow) as yarn if slow > 0:
            length = max(length, int(yarn.original_length * yarn.factor))
            rope = {
                "rope_type": "llama3",
                "factor": yarn.factor,
                "low_freq_factor": slow,
                "high_freq_factor": yarn.fast,
                "original_max_position_embeddings": yarn.original_length,
            }
        case _:
            return None
    return {
        **_plain_llama(model, text),
        "max_position_embeddings": length,
        "rope_scaling": rope,
        "rope_theta": spec.theta,
        "use_cache": True,
    }


def reference_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the published format.

    Raises:
        InputError: The format has no field for something; names it.
    """
    if model.config.qk_norm:
        raise _beyond("qk_norm")
    return {
        **_plain_llama(model, text),
        "rope_scaling": None,
        "use_cache": False,
        **_reference_position(model.position),
    }


def _plain_llama(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    return {
        **LLAMA,
        "ignore_index": model.ignore_index,
        **sizes(model.config, model.config),
        **text,
    }


def _reference_position(spec: Position) -> dict[str, Any]:
    kind = type(spec)
    if kind is ALiBi:
        return {"use_alibi": True, "rope_theta": 10000.0}
    if isinstance(spec, FoPE) and kind is FoPE:
        if spec.scaling is not None:
            raise _beyond("FoPE with scaling")
        return {
            **FOURIER,
            "fourier_dim": spec.basis_size,
            "fourier_init_norm_gain": spec.gain,
            "max_position_embeddings": spec.max_length,
            "rope_theta": spec.theta,
        }
    if isinstance(spec, RoPE) and (kind is Pythia or (kind is RoPE and spec.rotary_share != 1)):
        if spec.scaling is not None:
            raise _beyond("partial rotation with scaling")
        return {"partial_rotary_factor": spec.rotary_share, "rope_theta": spec.theta}
    if isinstance(spec, RoPE):
        rope: dict[str, Any] = {}
        if isinstance(spec.scaling, PI | YaRN):
            rope = {"factor": spec.scaling.factor, "yarn": isinstance(spec.scaling, YaRN)}
        for imag, mode in ((False, "imag1"), *((True, mode) for mode in IMAGINARY_MODES)):
            fields = {"rope_config": {"imag": imag, "imag_mode": mode, **rope}}
            # What is read back as something else has an argument that the format has not.
            if position(found := {**fields, "rope_theta": spec.theta}) == spec:
                return found
    raise _beyond(f"position {spec}")


def _beyond(what: str) -> InputError:
    return InputError(f"the reference format cannot express {what}; --format hf can")
