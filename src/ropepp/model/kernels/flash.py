"""The flash attention packages: flash-attn (2), which knows ALiBi, and flash-attn-4 for Hopper and
newer. Both align causality at the last query and the last key."""

from typing import Any

import torch
from torch import Tensor

from ropepp.model.kernels.backend import Backend, Request, half_on_cuda, head_size, load, older_than

FLASH2_PACKAGE = ("flash_attn", "flash-attn", "flash", "flash_attn_varlen_func")
FLASH4_PACKAGE = ("flash_attn.cute", "flash-attn-4", "flash4", "flash_attn_varlen_func")


def flash2(request: Request) -> Tensor:
    """FlashAttention-2 (arXiv 2307.08691)."""
    slopes = request.alibi_slopes
    return _run(
        load(*FLASH2_PACKAGE),
        request,
        alibi_slopes=None if slopes is None else slopes.float().contiguous(),
    )


def flash4(request: Request) -> Tensor:
    """FlashAttention-4, compiled for each combination of options on first use."""
    return _run(load(*FLASH4_PACKAGE), request)


def _run(package: Any, request: Request, **options: Any) -> Tensor:
    options |= {
        "softmax_scale": request.scale,
        "causal": request.causal,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if request.documents is None:
        out = package.flash_attn_func(request.q, request.k, request.v, **options)
    else:
        q, k, v, bounds, bounds_k, longest, longest_k = request.flattened()
        options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds_k}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest_k}
        out = package.flash_attn_varlen_func(q, k, v, **options)
    # flash-attn-4 always returns the log-sum-exp too.
    out = out[0] if isinstance(out, tuple) else out
    return out.view(request.q.shape)


def _missing(package: tuple[str, str, str, str]) -> str | None:
    found = load(*package)
    return found if isinstance(found, str) else None


def _refuse_flash2(request: Request) -> str | None:
    return (
        half_on_cuda(request, slopes=True)
        or head_size(request, 1, 256)
        or older_than(request, 8, "Ampere")
        or _missing(FLASH2_PACKAGE)
    )


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


FLASH2 = Backend("flash2", _refuse_flash2, flash2)
FLASH4 = Backend("flash4", _refuse_flash4, flash4)
