"""Models of other origin in, ours out."""

from ropepp.interop.published import load_pretrained

__all__ = ["load_pretrained"]
