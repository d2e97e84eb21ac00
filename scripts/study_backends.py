"""Attention backends that studies bring along: imaginary heads that teach a part of the model
nothing, for layouts in which real and imaginary heads take turns (EC, EH).

The forward pass is that of "auto"; the gradient of the imaginary heads ends before their queries
(``imaginary_not_into_q``), keys (``..._k``) or values (``..._v``).
"""

from dataclasses import replace
from typing import Any

import torch

from ropepp.model.kernels import BACKENDS, Backend, Request, attention
from ropepp.model.kernels.backend import Result


def served(request: Request) -> torch.Tensor:
    return attention(
        request.q,
        request.k,
        request.v,
        causal=request.causal,
        cu_seqlens=request.documents,
        cu_seqlens_k=request.documents_k,
        document_ids=request.document_ids,
        scale=request.scale,
    )


def imaginary_without(name: str) -> Backend:
    """A backend whose imaginary heads see one of "q", "k", "v" as a constant."""

    def forward(request: Request) -> Result:
        real, imaginary = request.q.unflatten(-2, (-1, 2)).unbind(-2)
        own: dict[str, Any] = {"q": imaginary, "k": request.k, "v": request.v}
        own[name] = own[name].detach()
        outs = served(replace(request, q=real)), served(replace(request, **own))
        return torch.stack(outs, dim=-2).flatten(-3, -2), None

    return Backend(f"imaginary_not_into_{name}", lambda request: None, forward)


BACKENDS.update({backend.name: backend for backend in map(imaginary_without, "qkv")})
