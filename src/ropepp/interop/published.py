"""Reads checkpoints in the format of the published RoPE++ models: config.json and
model.safetensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.positions import (
    PI,
    ALiBi,
    FoPE,
    HeadSplit,
    ImaginaryOnly,
    Position,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    Scaling,
    YaRN,
)
from ropepp.model.positions.alibi import slopes_of
from ropepp.model.transformer import Transformer

IMAGINARY_MODES: dict[str, Callable[..., RoPE]] = {
    "imag1": RoPEppEH,
    "imag2": RoPEppEC,
    "imagh": HeadSplit,
    "imago": ImaginaryOnly,
    "imagx": lambda **kwargs: HeadSplit(interleaved=True, **kwargs),
}
FOURIER_SETTINGS = {
    "fourier_ignore_zero": True,
    "fourier_learnable": False,
    "fourier_norm": False,
    "fourier_separate_basis": True,
    "fourier_separate_head": True,
    "rope_clamp_floor_freq": True,
    "rope_clamp_floor_to_zero": True,
}


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Loads a published checkpoint.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``.
        dtype: Dtype of the weights; frequencies stay float32.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        InputError: A file is missing, the configuration describes another architecture, or a tensor
            is missing, left over or of another shape.
    """
    folder = Path(folder)
    settings = read_settings(folder / "config.json")
    with torch.device("meta"):
        model = Transformer(
            model_config(settings), position(settings), ignore_index=ignore_index(settings)
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights} is missing: a checkpoint folder holds config.json and it")
    tensors = {our_name(name): tensor.to(dtype) for name, tensor in load_file(weights).items()}
    take_slopes(model, tensors, weights)
    check_tensors(model, tensors, weights)
    model.load_state_dict(tensors, assign=True)
    model.tie()
    return model.eval()


def read_settings(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: a checkpoint folder holds config.json and model.safetensors"
        )
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if settings.get("model_type") != "llama":
        raise InputError(f"{path}: model_type is {settings.get('model_type')!r}; allowed: 'llama'")
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise InputError(f"{path}: {key} is true; only models without biases can be loaded")
    if settings.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act is {settings['hidden_act']!r}; allowed: 'silu'")
    if settings.get("rope_scaling") is not None:
        raise InputError(f"{path}: rope_scaling is {settings['rope_scaling']!r}; allowed: null")
    return settings


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """Sizes from a published ``config.json``."""
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings.get("num_key_value_heads", settings["num_attention_heads"]),
        ffn_size=settings["intermediate_size"],
        head_size=settings.get("head_dim"),
        norm_eps=settings["rms_norm_eps"],
        tied_embeddings=settings.get("tie_word_embeddings", False),
        init_std=settings.get("initializer_range", 0.02),
    )


def position(settings: dict[str, Any]) -> Position:
    """The position encoding that a published ``config.json`` describes."""
    theta = settings.get("rope_theta", 10000.0)
    if settings.get("use_alibi"):
        return ALiBi()
    if settings.get("fourier"):
        return fourier(settings, theta)
    if "partial_rotary_factor" in settings:
        return Pythia(theta=theta, rotary_share=settings["partial_rotary_factor"])
    rope = settings.get("rope_config") or {}
    given = {"theta": theta, "scaling": scaling(rope)}
    if not rope.get("imag"):
        return RoPE(**given)
    mode = rope.get("imag_mode")
    if mode not in IMAGINARY_MODES:
        raise InputError(f"imag_mode is {mode!r}; allowed: {', '.join(IMAGINARY_MODES)}")
    return IMAGINARY_MODES[mode](**given)


def scaling(rope: dict[str, Any]) -> Scaling | None:
    """Context extension of a ``rope_config``; YaRN's original length is 4096 in this format."""
    factor = rope.get("factor")
    if factor is None:
        return None
    return YaRN(factor=factor) if rope.get("yarn") else PI(factor=factor)


def fourier(settings: dict[str, Any], theta: float) -> FoPE:
    """FoPE from its many fields, of which one combination is published."""
    for key, allowed in FOURIER_SETTINGS.items():
        if settings.get(key, allowed) != allowed:
            raise InputError(f"{key} is {settings[key]!r}; only {allowed!r} can be loaded")
    return FoPE(
        theta=theta,
        max_length=settings["max_position_embeddings"],
        basis_size=settings.get("fourier_dim", 128),
        gain=settings.get("fourier_init_norm_gain", 0.3),
    )


def ignore_index(settings: dict[str, Any]) -> int:
    """The target that published models leave out of their loss: end-of-text unless stated."""
    return settings.get("ignore_index", settings["eos_token_id"])


def our_name(name: str) -> str:
    """Our name of a published tensor."""
    return name.removeprefix("model.").replace(".self_attn.pos_emb.", ".self_attn.position.")


def take_slopes(model: Transformer, tensors: dict[str, Tensor], path: Path) -> None:
    """Removes ALiBi's stored slopes, which are constants here, after a check that they agree."""
    expected = torch.tensor(slopes_of(model.layout.num_heads))
    for name in [name for name in tensors if name.endswith(".alibi_slopes")]:
        found = tensors.pop(name).float().flatten()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2):
            raise InputError(f"{path}: {name!r} is {found.tolist()}; expected {expected.tolist()}")


def check_tensors(model: Transformer, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises an `InputError` that names the first tensor which is missing, left over or
    misshapen."""
    if model.config.tied_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("embed_tokens.weight", torch.empty(0)))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path
) -> None:
    """Raises an `InputError` that names the first tensor which is missing, left over or
    misshapen."""
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{path}: tensor {name!r} {shape} is missing")
        if found[name] != shape:
            raise InputError(f"{path}: {name!r} is {found[name]}; expected {shape}")
    if left := sorted(found.keys() - expected.keys()):
        raise InputError(f"{path}: unexpected tensor {left[0]!r} ({len(left)} in all)")
