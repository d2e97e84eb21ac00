"""The README of an exported folder, card.md filled in: what the model is, its run's figures, how to
load it."""

from pathlib import Path
from string import Template

import torch

from ropepp.interop.saved import SavedModel
from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters
from ropepp.runs.records import DIVERGED, read_result

CARD = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
LOADING = {
    "ropepp": """\
```python
# pip install 'ropepp[hf]'
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

The only code in this folder imports `ropepp`; whoever has done `import ropepp.interop.hf` need not
trust it.""",
    "llama": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

An ordinary ARCHITECTURE: any program that reads one takes it. Each attention head has a query
matrix of its own, its projection's turned by the head's phase; the KV cache is the variant's.""",
    "reference": """\
```python
# pip install ropepp
from ropepp.interop import load_pretrained

model = load_pretrained("FOLDER")
```

The format of the published RoPE++ checkpoints (arXiv 2512.07525), for that implementation too. A
program that takes it for an ordinary Llama computes something else.""",
}


def model_card(saved: SavedModel, kind: str, dtype: torch.dtype) -> str:
    """Markdown, of a folder whose kind is "reference" or its ``model_type``."""
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
    loading = LOADING.get(kind, LOADING["llama"]).replace("ARCHITECTURE", kind.capitalize())
    return CARD.substitute(
        library="ropepp" if kind == "reference" else "transformers",
        name=saved.name,
        variant=type(model.position).__name__,
        table=table,
        loading=loading,
    )
