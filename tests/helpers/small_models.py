"""Small models of every kind, and how tests export them."""

from pathlib import Path
from typing import Any

import torch

from helpers.variants import ALL
from ropepp.interop.export import export
from ropepp.interop.saved import SavedModel
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import (
    PI,
    FoPE,
    HeadSplit,
    Phases,
    Position,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    YaRN,
)

CONFIG = ModelConfig(50, 32, 2, 4, 2, 48, init_std=0.2)
# What an ordinary Llama computes too; and all others.
PLAIN: list[Position] = [
    RoPE(),
    RoPE(theta=5e5),
    RoPE(scaling=PI(4.0)),
    RoPE(scaling=YaRN(4.0, 16)),
    RoPE(scaling=YaRN(8.0, 64, slow=0.5, fast=8.0)),
]
ROTARY = [position for position in ALL if isinstance(position, RoPE) and type(position) is not RoPE]
LLAMAS: list[Position] = [
    *PLAIN,
    *[position for position in ROTARY if position.rotary_share == 1],
    RoPE(scaling=YaRN(4.0, 16, slow=0.0)),
    RoPEppEC(scaling=PI(4.0)),
    RoPEppEC(scaling=YaRN(4.0, 16)),
    RoPEppEH(theta=5e5),
    HeadSplit(interleaved=True),
    Phases(phases=(0.0, -30.0)),
    Phases(phases=(200.0, -30.0, 90.0)),
]
OTHERS: list[Position] = [
    *[position for position in ALL if not isinstance(position, RoPE)],
    Pythia(),
    RoPE(rotary_share=0.5),
    RoPEppEC(rotary_share=0.5),
    Pythia(scaling=YaRN(4.0, 16)),
    FoPE(scaling=PI(2.0)),
]


def label(position: Position) -> str:
    """A test's name."""
    return str(position).replace(" ", "")


def small(position: Position, **options: Any) -> Transformer:
    """A model with weights wide enough for attention that is far from uniform, and not so wide that
    float32 rounding shows."""
    return Transformer(CONFIG, position, **options).eval().requires_grad_(False)


def saved(model: Transformer, path: Path = Path("small")) -> SavedModel:
    """As `open_model` returns it, without a run or a tokenizer."""
    return SavedModel(model, path, None, None, {})


def exported(model: Transformer, folder: Path, form: str = "hf", **options: Any) -> Path:
    """Exports; returns the folder."""
    export(saved(model), folder, form, **options)
    return folder


def some_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the small models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, CONFIG.vocab_size, (rows, length), generator=generator)
