"""The authors' own folders: in as checkpoints, out in both forms, the same numbers everywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.golden_data import ROOT, expected, folders, tensor, variants
from helpers.hf_models import decode, load
from ropepp.generate import generate
from ropepp.interop import load_pretrained
from ropepp.interop.export import export
from ropepp.interop.hf import CACHE
from ropepp.interop.saved import import_checkpoint, open_model
from ropepp.model.cache import KVCache
from ropepp.model.folders.tensors import read_tensors

ALL = folders("mha-", "gqa")
every_folder = pytest.mark.parametrize("folder", ALL)


@every_folder
def test_imported_models_generate_the_golden_tokens(folder: str, tmp_path: Path) -> None:
    want = expected(folder)
    file = tmp_path / "model.ckpt"
    hyper_parameters = import_checkpoint(ROOT / folder, file)
    assert hyper_parameters["network"]["head_size"] is None  # as usual configurations have it
    saved = open_model(file)
    assert saved.step == 0
    ids = tensor(want["input_ids"])
    torch.testing.assert_close(saved.model(ids), tensor(want["logits"]), atol=1e-4, rtol=0)
    prompt = ids[:, : int(want["prompt_len"])]
    cache = KVCache(len(saved.model.layers))
    tokens = generate(saved.model, prompt, 16, cache=cache)[:, prompt.shape[1] :]
    assert tokens.tolist() == want["greedy_tokens"].tolist()
    if "cache_final_key_shape" in want:
        B, K, S, D = want["cache_final_key_shape"]
        assert cache.layers[0].held[0].shape == (B, S, K, D)


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the version of what has written it."""
    return {key: value for key, value in settings.items() if key != "transformers_version"}


@every_folder
def test_the_published_format_comes_out_as_it_went_in(folder: str, tmp_path: Path) -> None:
    saved = open_model(ROOT / folder)
    export(saved, tmp_path / "out", "reference", torch.bfloat16)
    want, found = (
        json.loads((at / "config.json").read_text()) for at in (ROOT / folder, tmp_path / "out")
    )
    assert comparable(found) == comparable(want)
    before, after = read_tensors(ROOT / folder), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor_ in before.items():
        assert torch.equal(after[name].float(), tensor_.float()), name
        assert after[name].shape == tensor_.shape
        if "pos_emb" not in name:
            assert after[name].dtype == tensor_.dtype, name
    ids = tensor(expected(folder)["input_ids"])
    assert torch.equal(load_pretrained(tmp_path / "out")(ids), saved.model(ids))


@every_folder
def test_transformers_computes_the_golden_numbers(folder: str, tmp_path: Path) -> None:
    want = expected(folder)
    model = load_pretrained(ROOT / folder)
    export(open_model(ROOT / folder), tmp_path / "out", "hf", torch.bfloat16)
    there = load(tmp_path / "out", dtype=torch.float32)
    ids = tensor(want["input_ids"])
    with torch.no_grad():
        out = there(ids)
    torch.testing.assert_close(out.logits, model(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logits, tensor(want["logits"]), atol=1e-4, rtol=0)
    assert (there.generation_config.bos_token_id, there.generation_config.eos_token_id) == (0, 1)
    assert there.config.ignore_index == model.ignore_index == 1
    if there.config.model_type == "ropepp":
        loss = there(ids, labels=ids).loss
        assert loss.item() == pytest.approx(float(want["loss"]), abs=1e-5)
    prompt = ids[:, : int(want["prompt_len"])]
    tokens = decode(there, prompt, max_new_tokens=16)[:, prompt.shape[1] :]
    assert tokens.tolist() == want["greedy_tokens"].tolist()
    if "cache_key_shape" in want:
        with torch.no_grad():
            cache = getattr(there(prompt, use_cache=True), CACHE)
        assert list(cache.layers[0].keys.shape) == list(want["cache_key_shape"])
        if "cache_key_layer0" in want:
            keys = cache.layers[0].keys
            torch.testing.assert_close(keys, tensor(want["cache_key_layer0"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", variants("pi8", "yarn32", "theta500k"))
@pytest.mark.parametrize("form", ["hf", "reference"])
def test_context_extensions(case: str, form: str, tmp_path: Path) -> None:
    """In transformers' own Llama, whose code has none of ours."""
    want, folder = expected(case), tmp_path / "in"
    folder.mkdir()
    shutil.copyfile(ROOT / case / "config.json", folder / "config.json")
    weights = ROOT / case.split("/")[0] / "model.safetensors"
    shutil.copyfile(weights, folder / weights.name)
    model, ids = load_pretrained(folder), tensor(want["input_ids"])
    export(open_model(folder), tmp_path / "out", form)
    back = load_pretrained(tmp_path / "out")
    assert back.position == model.position
    torch.testing.assert_close(back(ids), tensor(want["logits"]), atol=1e-4, rtol=0)
    if form == "hf":
        there = load(tmp_path / "out")
        assert there.config.model_type == "llama"
        with torch.no_grad():
            torch.testing.assert_close(there(ids).logits, tensor(want["logits"]), atol=1e-4, rtol=0)
