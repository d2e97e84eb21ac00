"""Continues prompts with a KV cache: `decode` makes tokens, `sampling` chooses them, `text` leads
from prompts to continuations.
"""

from ropepp.generate.decode import generate, pad_left, stream
from ropepp.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "pad_left", "stream"]
