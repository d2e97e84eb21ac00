"""The flash attention packages: flash-attn (2), which knows ALiBi, and flash-attn-4 for Hopper and
newer. Both align causality at the last query and the last key."""

from typing import Any

import torch
from torch import Tensor

from ropepp.model.kernels import backend as refusals
from ropepp.model.kernels.backend import Backend, load
from ropepp.model.kernels.request import Request

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
    if request.cu_seqlens is None:
        return _only(package.flash_attn_func(request.q, request.k, request.v, **options))
    flat = request.flattened()
    out = package.flash_attn_varlen_func(
        flat.q,
        flat.k,
        flat.v,
        cu_seqlens_q=flat.cu_seqlens,
        cu_seqlens_k=flat.cu_seqlens_k,
        max_seqlen_q=flat.longest,
        max_seqlen_k=flat.longest_k,
        **options,
    )
    return _only(out).view(request.q.shape)


def _only(result: Any) -> Tensor:
    """Without the log-sum-exp that flash-attn-4 always returns."""
    return result[0] if isinstance(result, tuple) else result


def _missing(package: tuple[str, str, str, str]) -> refusals.Check:
    def refuse(request: Request) -> str | None:
        found = load(*package)
        return found if isinstance(found, str) else None

    return refuse


def _flash4_head_size(request: Request) -> str | None:
    D, (major, _) = request.q.shape[-1], refusals.capability(request.q.device)
    if D % 8 == 0 and (D <= 128 or D == 256 or (major == 9 and D <= 256)):
        return None
    sizes = "up to 256" if major == 9 else "up to 128, or 256"
    return f"it needs a head size in multiples of 8 {sizes} on this GPU, and this is {D}"


def _flash4_not_deterministic(request: Request) -> str | None:
    deterministic = torch.are_deterministic_algorithms_enabled() and request.needs_grad
    if not deterministic or refusals.capability(request.q.device)[0] < 12:
        return None
    return "its backward pass is not deterministic on this GPU"


FLASH2 = Backend(
    "flash2",
    refusals.half_on_cuda(
        refusals.head_size(1, 256),
        refusals.older_than(8, "Ampere"),
        _missing(FLASH2_PACKAGE),
        slopes=True,
    ),
    flash2,
)

FLASH4 = Backend(
    "flash4",
    refusals.half_on_cuda(
        refusals.older_than(9, "Hopper"),
        _flash4_head_size,
        _flash4_not_deterministic,
        _missing(FLASH4_PACKAGE),
    ),
    flash4,
)
