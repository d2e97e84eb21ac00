"""What people have: folders that transformers' own classes write, from random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropepp.errors import InputError
from ropepp.interop import load_pretrained
from ropepp.interop.saved import import_checkpoint, open_model
from ropepp.model.positions import PI, RoPE, YaRN

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama-2": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-2-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "smollm2": (
        "Llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "rope_interleaved": False,
            "is_llama_config": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "mistral-odd": ("Mistral", {"sliding_window": None, "num_attention_heads": 10, "head_dim": 8}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen3-llama3": ("Qwen3", {"head_dim": 16, "rope_parameters": LLAMA3}),
}


def made(kind: str, folder: Path, **saving: Any) -> Any:
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    there = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms begin as ones, whose order could not be seen
        for key, weight in there.named_parameters():
            if "norm" in key:
                weight.copy_(torch.rand_like(weight) + 0.5)
    there.save_pretrained(folder, **saving)
    return there


def ids(rows: int = 2, length: int = 60) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    there = made(kind, tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    with torch.no_grad():
        want = there(ids()).logits
    torch.testing.assert_close(load_pretrained(tmp_path / "in")(ids()), want, atol=1e-4, rtol=0)
    import_checkpoint(tmp_path / "in", tmp_path / "in.ckpt")
    torch.testing.assert_close(
        open_model(tmp_path / "in.ckpt").model(ids()), want, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["llama-3.2", "qwen3", "mistral"])
def test_bfloat16_folders(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path / "in").to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    auto = transformers.AutoModelForCausalLM
    there = auto.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
    with torch.no_grad():
        want = there(ids()).logits
    found = load_pretrained(tmp_path / "rounded")(ids())
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama-2-linear", "llama-3.1", "llama-3.2"])
def test_the_older_form_of_rope_scaling(kind: str, tmp_path: Path) -> None:
    """Of files that were written before version 5, some of them with "type"."""
    there = made(kind, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    settings = json.loads(file.read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        older = {key: rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}
        file.write_text(json.dumps({**settings, "rope_scaling": older}))
        with torch.no_grad():
            want = there(ids()).logits
        found = load_pretrained(tmp_path / "in")
        torch.testing.assert_close(found(ids()), want, atol=1e-4, rtol=0)
        assert isinstance(found.position, RoPE)
        assert isinstance(found.position.scaling, PI if "linear" in kind else YaRN)


def test_frequencies_that_older_files_keep_are_left_out(tmp_path: Path) -> None:
    there = made("llama-1", tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, file)
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path / "in")(ids()), there(ids()).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama-2", {"attention_bias": True}, "attention_bias is true; allowed: false"),
        ("llama-2", {"mlp_bias": True}, "mlp_bias is true"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true"),
        ("mistral", {"sliding_window": 4096}, "sliding_window is 4096; allowed: null"),
        ("mistral", {"sliding_window": ...}, "sliding_window is 4096"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("llama-2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: \"silu\""),
        ("llama-2", {"logit_scale": 0.0625}, "logit_scale is 0.0625; allowed: 1.0"),
        ("llama-2", {"final_logit_softcapping": 30.0}, "softcapping is 30.0; allowed: null"),
        ("llama-2", {"rope_interleaved": True}, "rope_interleaved is true"),
        ("llama-2", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama-2", {"model_type": "qwen2"}, "model_type is 'qwen2'; allowed: 'llama', 'mistral'"),
        ("llama-2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama-2", {"rope_parameters": {"a": {"rope_theta": 1.0}}}, "rope_parameters has a"),
        ("llama-2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_refused_by_name(
    kind: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made(kind, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    content = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: x for key, x in content.items() if x is not ...}))
    with pytest.raises(InputError, match=words):
        load_pretrained(tmp_path / "in")


def test_biases_that_no_setting_tells_are_named(tmp_path: Path) -> None:
    made("llama-2", tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.1.self_attn.q_proj.bias": torch.zeros(48)}, file)
    with pytest.raises(InputError, match=r"unexpected tensor 'layers.1.self_attn.q_proj.bias'"):
        load_pretrained(tmp_path / "in")
