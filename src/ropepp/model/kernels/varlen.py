"""torch's flash attention over documents of any lengths in one call."""

import inspect
from typing import Any

from torch import Tensor

from ropepp.model.kernels.backend import Backend, half_on_cuda, head_size, older_than
from ropepp.model.kernels.request import Request


def varlen(request: Request) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; its causality is aligned at the last query and the
    last key of each document."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, bounds, bounds_k, longest, longest_k = request.flattened()
    options: dict[str, Any] = {
        "scale": request.scale,
        "window_size": (-1, 0) if request.causal else (-1, -1),
    }
    # Versions without the option take grouped heads as they are.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, **options)
    assert isinstance(out, Tensor)
    return out.view(request.q.shape)


def _refuse(request: Request) -> str | None:
    return half_on_cuda(request) or head_size(request, 8, 256) or older_than(request, 8, "Ampere")


VARLEN = Backend("varlen", _refuse, varlen)
