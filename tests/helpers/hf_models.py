"""Exported folders as transformers opens them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def load(folder: Path, **options: Any) -> Any:
    """As a user does it; an ordinary Llama needs no trust."""
    trust = json.loads((folder / "config.json").read_text())["model_type"] == "ropepp"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, **options
    )
    return model.eval()


def decode(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Six more tokens, whatever these are."""
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    config = transformers.GenerationConfig(**{**settings, **options})
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, generation_config=config)
