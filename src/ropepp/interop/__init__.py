"""Models of other origin in, ours out: `saved` opens any model, and makes a checkpoint of a folder;
`export` writes folders (`settings`, `text`), and `hf` is the model as transformers sees it.
"""

from ropepp.model.folders.published import load_pretrained

__all__ = ["load_pretrained"]
