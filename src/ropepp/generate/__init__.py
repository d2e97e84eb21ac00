"""Continues prompts with a KV cache."""

from ropepp.generate.decode import generate, pad_left, stream
from ropepp.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "pad_left", "stream"]
