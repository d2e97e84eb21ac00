"""What ``config.json`` says of a model in each form: the inverse of
`ropepp.model.folders.published`. What it says of the text comes from elsewhere:
``max_position_embeddings``, the longest row in tokens that the model was made for, and
``bos_token_id`` and ``eos_token_id``, which begin and end a document, or None.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.folders.published import FOURIER_SETTINGS, IMAGINARY_MODES, OWN_TYPE, position
from ropepp.model.heads import HeadLayout
from ropepp.model.plain import to_plain
from ropepp.model.positions import PI, ALiBi, FoPE, Position, Pythia, RoPE, Scaling, YaRN
from ropepp.model.positions.ropepp import Repeating
from ropepp.model.transformer import Transformer

Form = Literal["hf", "llama", "ropepp", "reference"]
MODELING = Path(__file__).with_name("modeling_ropepp.py")
# How config.json begins by kind: of a Llama; of a Mistral, the same arithmetic for any number of
# heads (with the version, or its tokenizer is suspected of an old fault), and a Qwen3, with an
# RMSNorm of queries and keys, what is different; of our own; and what published FoPE models state
# besides the settings on which loading insists.
FORMS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("forms.json").read_bytes())


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


def outer_name(name: str) -> str:
    """A tensor's name in a folder, which is a Llama's."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def settings_of(model: Transformer, text: dict[str, Any], form: Form) -> dict[str, Any]:
    """``config.json`` in a form of `ropepp.interop.export`; an `InputError` if it cannot be."""
    if form == "reference":
        return reference_settings(model, text)
    length, scaling = text["max_position_embeddings"], getattr(model.position, "scaling", None)
    if isinstance(scaling, YaRN):  # which is good for more than the rows of its training
        length = max(length, int(scaling.original_length * scaling.factor))
    text = text | {"max_position_embeddings": length}
    if form != OWN_TYPE:
        try:
            return llama_settings(model, text)
        except InputError:
            if form == "llama":
                raise
    return own_settings(model, text)


def own_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of any variant, for transformers with this package installed."""
    return {
        **_common(OWN_TYPE, model, model.layout, text),
        "network": asdict(model.config),
        "position": to_plain(model.position),
    }


def llama_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of an ordinary Llama that computes what the model does, with a query matrix
    for each attention head (see `ropepp.model.folders.tensors.turned`).

    A Mistral where transformers refuses a Llama's number of heads, a Qwen3 for ``qk_norm``: the
    same arithmetic. YaRN becomes "llama3", whose weights need its magnitude folded in. An
    `InputError` if there is no such Llama names what it lacks.
    """
    config, spec, layout = model.config, model.position, model.layout
    why, scaling = None, getattr(spec, "scaling", None)
    parts = ("table", "build", "frequencies")
    if not isinstance(spec, RoPE) or any(getattr(type(spec), x) != getattr(RoPE, x) for x in parts):
        why = f"position {spec}: it rotates queries and keys by RoPE's frequencies"
    elif spec.rotary_dim(config.head_dim) != config.head_dim:
        why = f"rotary_share {spec.rotary_share}: all components of its heads rotate"
    elif type(scaling) not in (type(None), Scaling, PI, YaRN):
        why = f"scaling {scaling}: it knows PI and YaRN"
    elif config.qk_norm and any(head.phase % 180 for head in layout.heads):
        norms = (x for name, x in model.named_parameters() if name.endswith("q_norm.weight"))
        if not all(torch.equal(*weight.chunk(2)) for weight in norms):
            why = "qk_norm with phases other than 0 and 180 degrees, whose halves a turn mixes"
    if why is not None:
        raise InputError(f"an ordinary Llama cannot express {why}; --format hf can")
    assert isinstance(spec, RoPE)
    rope: dict[str, Any] = {"rope_scaling": None}
    if isinstance(scaling, PI):
        rope = {"rope_scaling": {"rope_type": "linear", "factor": scaling.factor}}
    elif isinstance(scaling, YaRN):
        length = {"original_max_position_embeddings": scaling.original_length}
        ramp = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.slow or 1e-9,  # by which it divides; none in float32
            "high_freq_factor": scaling.fast,
        }
        rope = {"rope_scaling": ramp | length, **length}  # llama.cpp's converter takes the second
    # Transformers refuses a Llama whose width is no multiple of the number of heads.
    kind = "mistral" if config.hidden_size % layout.num_heads else "llama"
    return {
        **_common("llama", model, layout, text),
        OWN_TYPE: {"network": asdict(config), "position": to_plain(spec)},  # for reading it back
        "rope_theta": spec.theta,
        "use_cache": True,
        **rope,
        **FORMS["qwen3" if config.qk_norm else kind],
    }


def reference_settings(model: Transformer, text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the published format; an `InputError` names what it has no field for."""
    if model.config.qk_norm:
        raise _beyond("qk_norm")
    return {
        **_common("llama", model, model.config, text),
        "rope_scaling": None,
        "use_cache": False,
        **_reference_position(model.position),
    }


def _common(
    kind: str, model: Transformer, heads: ModelConfig | HeadLayout, text: dict[str, Any]
) -> dict[str, Any]:
    """What every ``config.json`` here says."""
    own = {"ignore_index": model.ignore_index, **sizes(model.config, heads)}
    return {**FORMS[kind], **own, **text}


def _reference_position(spec: Position) -> dict[str, Any]:
    kind = type(spec)
    if kind is ALiBi:
        return {"use_alibi": True, "rope_theta": 10000.0}
    if isinstance(spec, FoPE) and kind is FoPE:
        if spec.scaling is not None:
            raise _beyond("FoPE with scaling")
        return {
            **FOURIER_SETTINGS,
            **FORMS["fope"],
            "fourier_dim": spec.basis_size,
            "fourier_init_norm_gain": spec.gain,
            "max_position_embeddings": spec.max_length,
            "rope_theta": spec.theta,
        }
    if isinstance(spec, RoPE) and (kind is Pythia or (kind is RoPE and spec.rotary_share != 1)):
        if spec.scaling is not None:
            raise _beyond("partial rotation with scaling")
        return {"partial_rotary_factor": spec.rotary_share, "rope_theta": spec.theta}
    if isinstance(spec, Repeating):  # how it began is no matter
        spec = replace(spec, start_as_rope=False)
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
