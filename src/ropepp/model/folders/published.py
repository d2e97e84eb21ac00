"""Reads folders of config.json and safetensors: the published RoPE++ models, plain Llamas and what
has their arithmetic (SmolLM2, Mistral without a window, Qwen3), and this project's own exports."""

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropepp.checksums import check_files, listed
from ropepp.errors import InputError
from ropepp.model import positions as specs
from ropepp.model.config import ModelConfig
from ropepp.model.folders.tensors import read_tensors, turned_back
from ropepp.model.loss import IGNORE_INDEX
from ropepp.model.plain import from_plain, require_plain, understanding
from ropepp.model.positions.alibi import slopes_of
from ropepp.model.transformer import Transformer
from ropepp.records import SETTINGS, read_object

OWN_TYPE = "ropepp"  # model_type of our own exports
TYPES = ("llama", "mistral", "qwen3", OWN_TYPE)
# Keys that change what is computed: what stands there if they are missing, and may stand there; of
# all models, and of those with FoPE.
FIXED, FOURIER_SETTINGS = json.loads(Path(__file__).with_name("fixed.json").read_bytes())
SPECS = specs.__name__

IMAGINARY_MODES: dict[str, Callable[..., specs.RoPE]] = {
    "imag1": specs.RoPEppEH,
    "imag2": specs.RoPEppEC,
    "imagh": specs.HeadSplit,
    "imago": specs.ImaginaryOnly,
    "imagx": lambda **kwargs: specs.HeadSplit(interleaved=True, **kwargs),
}


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Loads a folder of a published checkpoint, of a plain Llama, or of this project's exports:
    ``config.json`` and ``model.safetensors``, or its shards and their index. The model is in
    evaluation mode, on the CPU, its weights in ``dtype``; what a position encoding keeps stays
    float32. An `InputError` if a file is missing, the configuration describes another architecture,
    or a tensor is missing, left over or of another shape."""
    folder = Path(folder)
    settings = read_settings(folder / "config.json")
    config, spec = architecture(settings, folder / "config.json")
    # Also what others read, such as the tokenizer.
    check_files(folder, (name for name in listed(folder) if not name.endswith(".safetensors")))
    tensors = {}
    for outer, tensor in read_tensors(folder).items():
        name = outer.removeprefix("network.").removeprefix("model.")
        if not name.endswith("rotary_emb.inv_freq"):  # of older Llamas: it follows from settings
            tensors[name.replace(".self_attn.pos_emb.", ".self_attn.position.")] = tensor
    if OWN_TYPE in settings:
        with understanding(folder / "config.json"):
            of_it = {**settings, **settings[OWN_TYPE], "model_type": OWN_TYPE}
        made_of = architecture(of_it, folder / "config.json")
        if _turns_alike((config, spec), made_of, folder):
            made = take_projections(tensors, *made_of, folder)
            config, spec = made_of if made else (config, spec)
    model = unfilled(config, spec, folder / "config.json", ignore_index(settings))
    take_slopes(model, tensors, folder)
    if config.tied_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("embed_tokens.weight", torch.empty(0)))
    check_shapes(model.state_dict(), {name: tuple(x.shape) for name, x in tensors.items()}, folder)
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    factors = query_key_factors(settings, spec)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name!r} is {tensor.dtype}; weights are floating-point")
        wide = tensor.float() * factors.get(name.rsplit(".", 2)[-2], 1.0)
        tensors[name] = wide.to(dtype) if name in weights else wide
    model.load_state_dict(tensors, assign=True)
    model.tie()
    return model.eval()


def unfilled(
    config: ModelConfig, spec: specs.Position, name: Path, ignore_index: int = IGNORE_INDEX
) -> Transformer:
    """A model on the meta device, as the file ``name`` says; an `InputError` if that makes none."""
    with understanding(name):
        if type(ignore_index) is not int:
            raise InputError(f"ignore_index is {ignore_index!r}; it must be a whole number")
        with torch.device("meta"):
            model = Transformer(config, spec, ignore_index=ignore_index)
        spec.table(torch.zeros(1, 1, dtype=torch.int64), config)  # what every pass begins with
    return model


def read_settings(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: a checkpoint folder holds config.json and model.safetensors"
        )
    check_files(path.parent, [path.name])
    settings = read_object(path, SETTINGS)
    require_plain(settings, str(path))
    kind = settings.get("model_type")
    if kind not in TYPES:
        raise InputError(f"{path}: model_type is {kind!r}; allowed: {', '.join(map(repr, TYPES))}")
    # A Mistral that says nothing of its window has one of 4096 tokens.
    window = {"sliding_window": 4096} if kind == "mistral" else {}
    for key, allowed in (FIXED | dict.fromkeys(window)).items():
        found = settings.get(key, window.get(key, allowed))
        if found != allowed and found not in (None, False):
            shown = str(found).lower() if isinstance(found, bool) else repr(found)
            raise InputError(f"{path}: {key} is {shown}; allowed: {json.dumps(allowed)}")
    return settings


def architecture(settings: dict[str, Any], path: Path) -> tuple[ModelConfig, specs.Position]:
    """Sizes and position encoding that a ``config.json`` describes, published, Llama's or ours; an
    `InputError` if something is missing or unknown."""
    with understanding(path):  # a class's own message names its argument
        if settings["model_type"] == OWN_TYPE:
            # What transformers changes of a model, it changes by the customary names.
            named = {"vocab_size": "vocab_size", "tied_embeddings": "tie_word_embeddings"}
            changed = {own: settings[name] for own, name in named.items() if name in settings}
            network = ModelConfig(**{**settings["network"], **changed})
            return network, own_position(settings["position"])
        return model_config(settings), position(settings)


def own_position(plain: dict[str, Any]) -> specs.Position:
    """A position encoding from plain values that anybody may have written."""
    found = from_plain(plain, SPECS)
    if not isinstance(found, specs.Position):
        raise InputError(f"class_path is {plain['class_path']!r}, which is no position encoding")
    return found


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """Sizes from a published or a Llama's ``config.json``; defaults are those of transformers."""
    qwen = settings["model_type"] == "qwen3"
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim", 128 if qwen else None)
    return ModelConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        ffn_size=settings["intermediate_size"],
        head_size=None if head_dim and head_dim * heads == hidden else head_dim,
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        tied_embeddings=settings.get("tie_word_embeddings", False),
        qk_norm=qwen,
        init_std=settings.get("initializer_range", 0.02),
    )


def position(settings: dict[str, Any]) -> specs.Position:
    """The position encoding that a published or a Llama's ``config.json`` describes."""
    rope = settings.get("rope_config") or {}
    llama = rope_parameters(settings)
    theta = llama["rope_theta"]
    scaling = llama_scaling(llama)
    alibi, fope = settings.get("use_alibi"), settings.get("fourier")
    if scaling is not None and (alibi or fope):
        raise InputError(f"rope_scaling is {llama}; allowed is none beside use_alibi and fourier")
    if alibi or fope:
        return specs.ALiBi() if alibi else fourier(settings, theta)
    if (share := settings.get("partial_rotary_factor", 1.0)) != 1.0:
        return specs.Pythia(theta=theta, scaling=scaling, rotary_share=share)
    if (factor := rope.get("factor")) is not None:
        # YaRN's original length is 4096 in this format.
        scaling = specs.YaRN(factor=factor) if rope.get("yarn") else specs.PI(factor=factor)
    given = {"theta": theta, "scaling": scaling}
    if not rope.get("imag"):
        return specs.RoPE(**given)
    mode = rope.get("imag_mode")
    if mode not in IMAGINARY_MODES:
        raise InputError(f"imag_mode is {mode!r}; allowed: {', '.join(IMAGINARY_MODES)}")
    return IMAGINARY_MODES[mode](**given)


def rope_parameters(settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers calls so since version 5, and kept in two places before."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    for key, value in given.items():
        if isinstance(value, dict) or (key == "partial_rotary_factor" and value != 1.0):
            raise InputError(f"rope_parameters has {key} {value}; allowed is one rotation of all")
    return {
        "rope_theta": settings.get("rope_theta", 10000.0),
        "rope_type": given.get("type", "default"),
        **given,
    }


def llama_scaling(rope: dict[str, Any]) -> specs.Scaling | None:
    """Context extension of a Llama in transformers.

    Its "llama3" blends frequencies by the turns that they make within the original length, which is
    our YaRN but for the magnitude, see `query_key_factors`; its "yarn" blends by their index.
    """
    match rope["rope_type"]:
        case "default":
            return None
        case "linear":
            return specs.PI(factor=rope["factor"])
        case "llama3":
            return specs.YaRN(
                factor=rope["factor"],
                original_length=rope["original_max_position_embeddings"],
                slow=rope["low_freq_factor"],
                fast=rope["high_freq_factor"],
            )
    raise InputError(f"rope_type is {rope['rope_type']!r}; allowed: default, linear, llama3")


def query_key_factors(settings: dict[str, Any], spec: specs.Position) -> dict[str, float]:
    """What the query and key projections, or the norms behind them, are multiplied by, so that a
    Llama's "llama3" scaling, which has no magnitude, becomes YaRN with one."""
    if settings["model_type"] == OWN_TYPE or rope_parameters(settings)["rope_type"] != "llama3":
        return {}
    assert isinstance(spec, specs.RoPE)
    assert spec.scaling is not None
    last = "norm" if settings["model_type"] == "qwen3" else "proj"
    return dict.fromkeys((f"q_{last}", f"k_{last}"), 1.0 / spec.scaling.magnitude)


def fourier(settings: dict[str, Any], theta: float) -> specs.FoPE:
    """FoPE from its many fields, of which one combination is published."""
    for key, allowed in FOURIER_SETTINGS.items():
        if settings.get(key, allowed) != allowed:
            raise InputError(f"{key} is {settings[key]!r}; only {allowed!r} can be loaded")
    return specs.FoPE(
        theta=theta,
        max_length=settings["max_position_embeddings"],
        basis_size=settings.get("fourier_dim", 128),
        gain=settings.get("fourier_init_norm_gain", 0.3),
    )


def ignore_index(settings: dict[str, Any]) -> int:
    """The target left out of the loss: of a published model end-of-text unless stated."""
    published = settings.keys() & {"rope_config", "use_alibi", "fourier", "partial_rotary_factor"}
    usual = settings.get("eos_token_id") if published else None
    stated = settings.get("ignore_index", usual)
    return stated if isinstance(stated, int) else IGNORE_INDEX


def _turns_alike(llama: tuple[Any, Any], made_of: tuple[Any, Any], folder: Path) -> bool:
    """Whether an exported Llama norms and rotates as what it was made of, with a warning if not."""
    places, pairs = torch.arange(0, 4096, 512)[None], (llama, made_of)
    (turns, others), eps = (spec.table(places, config) for config, spec in pairs), llama[0].norm_eps
    near = all(map(partial(torch.allclose, atol=1e-4), turns, others))
    if near and eps == made_of[0].norm_eps:
        return True
    warnings.warn(f"{folder}: theta, scaling or norms were changed; read as a Llama", stacklevel=3)
    return False


def take_projections(
    tensors: dict[str, Tensor], config: ModelConfig, spec: specs.Position, folder: Path
) -> bool:
    """Gives an ordinary Llama back the query projections that it was made of, see `turned` in
    `ropepp.model.folders.tensors`; False, with a warning, if it was trained as a Llama since."""
    layout, found = spec.layout(config.num_heads, config.num_kv_heads), {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            rows = layout.num_heads * config.head_dim
            own = turned_back(tensor, layout) if len(tensor) == rows else None
            if own is None:
                warnings.warn(
                    f"{folder}: heads of {name} differ by more than {spec} says; read as a Llama",
                    stacklevel=3,
                )
                return False
            found[name] = own.to(tensor.dtype)
    tensors |= found
    return True


def take_slopes(model: Transformer, tensors: dict[str, Tensor], path: Path) -> None:
    """Removes ALiBi's stored slopes, which are constants here, after a check that they agree."""
    expected = torch.tensor(slopes_of(model.layout.num_heads))
    for name in [name for name in tensors if name.endswith(".alibi_slopes")]:
        found = tensors.pop(name).float().flatten()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2):
            raise InputError(f"{path}: {name!r} is {found.tolist()}; expected {expected.tolist()}")


def check_shapes(
    own: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]], path: Path | str
) -> None:
    """Raises an `InputError` that names the first of a model's own tensors which is missing or of
    another shape than was found at ``path``, or what is left over there."""
    for name, tensor in own.items():
        shape = tuple(tensor.shape)
        if name not in found:
            raise InputError(f"{path}: tensor {name!r} {shape} is missing")
        if found[name] != shape:
            raise InputError(f"{path}: {name!r} is {found[name]}; expected {shape}")
    if left := sorted(found.keys() - own.keys()):
        raise InputError(f"{path}: unexpected tensor {left[0]!r} ({len(left)} in all)")
