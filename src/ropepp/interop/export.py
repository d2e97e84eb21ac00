"""Models out: folders that transformers, the authors' implementation and this project read."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ropepp.checksums import write_checksums
from ropepp.data.tokenizer import load_tokenizer
from ropepp.files import replacing_folder, write_json, write_text
from ropepp.interop.saved import SavedModel
from ropepp.interop.settings import MODELING, Form, outer_name, settings_of
from ropepp.interop.text import write_tokenizer
from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters
from ropepp.model.folders.published import OWN_TYPE
from ropepp.model.folders.tensors import SHARD_BYTES, turned, write_tensors
from ropepp.model.positions import ALiBi
from ropepp.model.positions.alibi import slopes_of
from ropepp.model.transformer import Transformer
from ropepp.runs.checkpoints import TOKENIZERS
from ropepp.runs.records import DIVERGED, read_result

CARDS = Path(__file__).with_name("cards")  # card.md, and how a folder of each kind is loaded
DEFAULT_LENGTH = 4096  # where nothing tells how long rows were


def export(
    saved: SavedModel,
    folder: str | Path,
    form: Form,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a model that was opened in float32 as a folder, which is complete or absent, with
    weights in ``dtype``; returns the content of its ``config.json``. An `InputError` if the folder
    exists, the form cannot express the model, or there is no tokenizer where the model's text had
    one.

    Args:
        form: "llama": an ordinary Llama, with a query matrix for each attention head. "ropepp": a
            folder with a file that makes transformers use this package, for every model. "hf": a
            Llama where there is one that computes the same, otherwise as "ropepp". "reference": the
            published RoPE++ format.
        tokenizer: See `SavedModel.tokenizer`; a model without text has none.
        shard_bytes: Largest size of a file of weights.
    """
    saved.require_finite()
    model = saved.model
    found = saved.tokenizer(tokenizer) if tokenizer or saved.tokenizer_place() else None
    # What the model was made for, without a tokenizer's word; see `ropepp.interop.settings`.
    text: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    length = saved.data_arguments.get("sequence_length", DEFAULT_LENGTH)
    text |= {"max_position_embeddings": length} | saved.text
    if found is not None:
        text |= {"bos_token_id": found.bos_id, "eos_token_id": found.eot_id}
    settings, prints = settings_of(model, text, form), saved.tokenizers
    kind = form if form == "reference" else str(settings["model_type"])
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")
    with replacing_folder(Path(folder)) as work:
        write_tensors(work, _tensors(model, kind, dtype), shard_bytes)
        if found is not None:
            write_tokenizer(found, work, settings["max_position_embeddings"])
            # Of what it was made from, and of the file that lies here.
            prints = (found.fingerprint, load_tokenizer(work).fingerprint)
        if prints:
            settings[TOKENIZERS] = list(dict.fromkeys(prints))
        settings = dict(sorted(settings.items()))
        write_json(work / "config.json", settings)
        if (end := text["eos_token_id"]) is not None:
            ids = {"bos_token_id": text["bos_token_id"], "eos_token_id": end, "pad_token_id": end}
            write_json(work / "generation_config.json", ids)
        if kind == OWN_TYPE:
            shutil.copyfile(MODELING, work / MODELING.name)
        write_text(work / "README.md", model_card(saved, kind, dtype))
        write_checksums(work, (file.name for file in work.iterdir() if file.suffix != ".md"))
    return settings


def _tensors(model: Transformer, kind: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors by their outer names; a tied output layer is left out, as it is the embedding."""
    scaling = getattr(model.position, "scaling", None)
    ordinary = kind not in ("reference", OWN_TYPE)
    # "llama3" has no magnitude: each side of the score takes its own into what comes last.
    magnitude = scaling.magnitude if ordinary and scaling is not None else 1.0
    last = "norm" if model.config.qk_norm else "proj"
    weights = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tied_embeddings:
            continue
        wide = tensor.float()
        if ordinary and name.endswith("q_proj.weight"):
            wide = turned(wide, model.layout)
        if name.endswith((f"q_{last}.weight", f"k_{last}.weight")):
            wide = wide * magnitude
        outer = outer_name(name)
        if kind == "reference":
            outer = outer.replace(".self_attn.position.", ".self_attn.pos_emb.")
        yield outer, wide.to(dtype) if name in weights else wide
    if kind == "reference" and isinstance(model.position, ALiBi):
        slopes = torch.tensor(slopes_of(model.layout.num_heads))
        for index in range(model.config.num_layers):
            yield f"model.layers.{index}.self_attn.alibi_slopes", slopes.clone()


def model_card(saved: SavedModel, kind: str, dtype: torch.dtype) -> str:
    """The folder's README: what the model is, its run's figures, how to load it; ``kind`` is
    "reference" or its ``model_type``."""
    model, config, layout = saved.model, saved.model.config, saved.model.layout
    sizes = f"{config.num_layers}, {config.hidden_size:,}, {config.ffn_size:,}"
    heads = f"{layout.num_heads}, {layout.num_projections}, {layout.num_kv_heads}"
    rows = {
        "variant": f"`{model.position}`",
        "parameters": f"{num_parameters(model):,}",
        "layers, width, feed-forward": sizes,
        "attention heads, query projections, kv heads, head size": f"{heads}, {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "KV cache, bytes a token in bfloat16": f"{kv_cache_bytes_per_token(model):,}",
        "weights": str(dtype).removeprefix("torch."),
    }
    if saved.step is not None:
        rows["optimizer steps"] = f"{saved.step:,}"
    if saved.corpora:
        rows["data"] = ", ".join(Path(corpus).name for corpus in saved.corpora)
    result = read_result(saved.run) if saved.run is not None else {}
    # The run's figures, if they are those of these weights.
    if result and result.get("steps") == saved.step and DIVERGED not in result:
        loss, perplexity = result["validation_loss"], result["validation_perplexity"]
        versions = f"ropepp {result['ropepp']}, commit {result['commit']}, torch {result['torch']}"
        rows |= {
            "tokens seen": f"{result['tokens']:,} in rows of {result['sequence_length']:,}",
            "validation loss, nats a token": f"{loss:.4f} (perplexity {perplexity:.2f})",
            "seed": f"{result['seed']} (one run: differences of variants need several)",
            "code": versions,
        }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    loading = CARDS / f"{kind if kind in ('reference', 'ropepp') else 'llama'}.md"
    return _filled(
        CARDS / "card.md",
        library="ropepp" if kind == "reference" else "transformers",
        name=saved.name,
        variant=type(model.position).__name__,
        table=table,
        loading=_filled(loading, architecture=kind.capitalize()).rstrip(),
    )


def _filled(template: Path, **values: str) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)
