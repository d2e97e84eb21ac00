"""A folder whose config.json says anything is refused in one line, or is a model."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.any_values import MANY, VALUES, accepted_or_refused, changed
from helpers.golden_data import HERE
from ropepp.model.folders.published import load_pretrained

KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps",
        "tie_word_embeddings", "model_type", "torch_dtype", "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("name", ["mha-ec", "gqa-fope"])
@given(data=st.data())
@settings(MANY, max_examples=80)
def test_any_setting(name: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(HERE / "golden" / name / "model.safetensors", folder)
    config = json.loads((HERE / "golden" / name / "config.json").read_text())
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(KEYS))] = data.draw(VALUES)
    else:
        config = changed(config, data.draw)
    (folder / "config.json").write_text(json.dumps(config))
    with accepted_or_refused():
        load_pretrained(folder)


@given(data=st.data())
@settings(MANY, max_examples=60)
def test_any_bytes_of_weights(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / "golden" / "mha-ec" / "config.json", folder)
    whole = (HERE / "golden" / "mha-ec" / "model.safetensors").read_bytes()
    at = data.draw(st.integers(0, 2000))
    some = data.draw(st.binary(min_size=1, max_size=16))
    how = data.draw(st.sampled_from(["cut", "other", "all"]))
    after = {"cut": whole[:at], "other": whole[:at] + some + whole[at + len(some) :], "all": some}
    (folder / "model.safetensors").write_bytes(after[how])
    with accepted_or_refused():
        load_pretrained(folder)
