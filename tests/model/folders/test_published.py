"""Reading published folders: what is refused, and in which words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden_data import ROOT, expected, tensor
from ropepp.errors import InputError
from ropepp.interop import load_pretrained
from ropepp.model.positions import PI, Pythia


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "mha-rope"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(ROOT / "mha-rope" / name, copy / name)
    return copy


def change(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; allowed"),
        ({"rope_scaling": {"type": "linear"}}, "wrong value: 'factor'"),
        ({"rope_config": {"imag": True, "imag_mode": "imag9"}}, "imag_mode is 'imag9'; allowed"),
        ({"intermediate_size": 80}, r"gate_proj.weight' is \(160, 64\); expected \(80, 64\)"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "unexpected tensor 'layers.2"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, settings: dict[str, object], words: str) -> None:
    change(folder, **settings)
    with pytest.raises(InputError, match=words):
        load_pretrained(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_pretrained(folder)
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        load_pretrained(folder)


def test_tied_embeddings_need_one_matrix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    change(folder, tie_word_embeddings=True)
    model = load_pretrained(folder)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_dtype_is_float32_unless_asked() -> None:
    ids = tensor(expected("mha-ec")["input_ids"])
    exact, rounded = (
        load_pretrained(ROOT / "mha-ec"),
        load_pretrained(ROOT / "mha-ec", torch.bfloat16),
    )
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert not exact.training
    error = (rounded(ids).float() - exact(ids)).norm() / exact(ids).norm()
    assert error < 0.05


def test_a_plain_llama_leaves_no_target_out(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for key in ("ignore_index", "rope_config", "use_alibi", "fourier", "partial_rotary_factor"):
        settings.pop(key, None)
    settings["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_pretrained(folder).ignore_index == -100
    change(folder, rope_config={"imag": False})
    assert load_pretrained(folder).ignore_index == 2


def test_scaling_beside_other_encodings(folder: Path) -> None:
    change(folder, rope_scaling={"rope_type": "linear", "factor": 8.0}, partial_rotary_factor=0.5)
    assert load_pretrained(folder).position == Pythia(rotary_share=0.5, scaling=PI(8.0))
    change(folder, use_alibi=True)
    with pytest.raises(InputError, match="allowed is none beside use_alibi"):
        load_pretrained(folder)
