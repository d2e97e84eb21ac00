"""FlashAttention over documents of any lengths in one call: torch's own, and that of the packages
flash-attn (2), which knows ALiBi, and flash-attn-4 for Hopper and newer. All align causality at the
last query and key of a document. Those for users hide the log-sum-exp: called are those below.
"""

from typing import Any

import torch
from torch import Tensor

from ropepp.model.kernels.backend import (
    Backend,
    Gradients,
    Request,
    Result,
    half_on_cuda,
    load,
    older_than,
)

aten = torch.ops.aten

FLASH2_PACKAGE = (
    *("flash_attn.flash_attn_interface", "flash-attn", "flash"),
    "_wrapped_flash_attn_varlen_forward",
)
FLASH4_PACKAGE = ("flash_attn.cute.interface", "flash-attn-4", "flash4", "_flash_attn_fwd")


def varlen(request: Request) -> Result:
    """What `torch.nn.attention.varlen` calls (FlashAttention-2, arXiv 2307.08691)."""
    q, k, v, *documents = request.flattened()
    out, log_sum, *_ = aten._flash_attention_forward(
        q, k, v, *documents, 0.0, request.causal, False, scale=request.scale
    )
    return out.view(request.q.shape), log_sum.flatten()


def varlen_backward(request: Request, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    q, k, v, *documents = request.flattened()
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    gradients = aten._flash_attention_backward(
        *(grad.flatten(0, 1), q, k, v, out.flatten(0, 1), log_sum.view(-1, len(q)), *documents),
        *(0.0, request.causal, seed, q.new_empty(0)),
        scale=request.scale,
    )
    return _shaped(request, gradients)


def flash2(request: Request) -> Result:
    q, k, v, *documents = request.flattened()
    out, log_sum, *_ = load(*FLASH2_PACKAGE)._wrapped_flash_attn_varlen_forward(
        q, k, v, *documents, **_flash2_options(request), return_softmax=False
    )
    return out.view(request.q.shape), log_sum.flatten()


def flash2_backward(request: Request, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    q, k, v, *documents = request.flattened()
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    load(*FLASH2_PACKAGE)._wrapped_flash_attn_varlen_backward(
        *(grad.flatten(0, 1), q, k, v, out.flatten(0, 1), log_sum.view(-1, len(q)), *gradients),
        *documents,
        **_flash2_options(request),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _shaped(request, gradients)


def _flash2_options(request: Request) -> dict[str, Any]:
    slopes = request.alibi_slopes
    return {
        "dropout_p": 0.0,
        "softmax_scale": request.scale,
        "causal": request.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None if slopes is None else slopes.float().contiguous(),
    }


def flash4(request: Request) -> Result:
    """FlashAttention-4, compiled for each combination of options on first use."""
    q, k, v, *documents = request.flattened()
    out, log_sum, *_ = load(*FLASH4_PACKAGE)._flash_attn_fwd(
        q, k, v, **_flash4_options(request, documents), return_lse=True
    )
    return out.view(request.q.shape), log_sum.flatten()


def flash4_backward(request: Request, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
    q, k, v, *documents = request.flattened()
    gradients = load(*FLASH4_PACKAGE)._flash_attn_bwd(
        *(q, k, v, out.flatten(0, 1), grad.flatten(0, 1), log_sum.view(-1, len(q))),
        **_flash4_options(request, documents),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _shaped(request, gradients)


def _flash4_options(request: Request, documents: list[Any]) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options = dict(zip(names, documents, strict=True))
    return {**options, "softmax_scale": request.scale, "causal": request.causal}


def _shaped(request: Request, gradients: tuple[Tensor, ...]) -> Gradients:
    d_q, d_k, d_v, *_ = gradients
    return d_q.view(request.q.shape), d_k.view(request.k.shape), d_v.view(request.v.shape)


def _missing(package: tuple[str, str, str, str]) -> str | None:
    found = load(*package)
    return found if isinstance(found, str) else None


def _refuse_varlen(request: Request, slopes: bool = False) -> str | None:
    if reason := half_on_cuda(request, slopes):
        return reason
    size = request.q.shape[-1]
    if size % 8 or size > 256:
        return f"it needs a head size in multiples of 8 up to 256, and this is {size}"
    return older_than(request, 8, "Ampere")


def _refuse_flash2(request: Request) -> str | None:
    return _refuse_varlen(request, slopes=True) or _missing(FLASH2_PACKAGE)


def _refuse_flash4(request: Request) -> str | None:
    if reason := half_on_cuda(request) or older_than(request, 9, "Hopper"):
        return reason
    D, (major, _) = request.q.shape[-1], torch.cuda.get_device_capability(request.q.device)
    if D % 8 or not (D <= 128 or D == 256 or (major == 9 and D <= 256)):
        sizes = "up to 256" if major == 9 else "up to 128, or 256"
        return f"it needs a head size in multiples of 8 {sizes} on this GPU, and this is {D}"
    if torch.are_deterministic_algorithms_enabled() and request.needs_grad and major >= 12:
        return "its backward pass is not deterministic on this GPU"
    return _missing(FLASH4_PACKAGE)


VARLEN = Backend("varlen", _refuse_varlen, varlen, varlen_backward)
FLASH2 = Backend("flash2", _refuse_flash2, flash2, flash2_backward)
FLASH4 = Backend("flash4", _refuse_flash4, flash4, flash4_backward)
