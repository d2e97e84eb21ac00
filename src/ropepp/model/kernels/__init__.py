"""Attention over flattened or padded rows: one function, named backends.

Shapes: B batch, T queries, S keys, H attention heads, K kv heads, G = H / K, D head size. Heads are
contiguous per kv head: attention head h uses kv head ``h // G``, so real and imaginary heads of one
projection share keys and values in a single call; the reference alone repeats them in memory.

`operator` has the function, `registry` chooses a backend, `backend` says what one is and is asked
for; `definition` is the plain formula that every backend is tested against, the other files are the
backends, and `dense` the kernels of those that go row by row.
"""

from ropepp.model.kernels.backend import Backend, Request
from ropepp.model.kernels.operator import attention
from ropepp.model.kernels.registry import BACKENDS, choose

__all__ = ["BACKENDS", "Backend", "Request", "attention", "choose"]
