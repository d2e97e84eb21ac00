"""What this machine is and can do, probed rather than assumed."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ropepp import __version__


def probe() -> dict[str, Any]:
    """Tries out what fast training needs: bfloat16 products in hardware and a working compiler; a
    reason is empty where the thing works."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16_reason, reason = no_bfloat16(device), compile_reason(device)
    return {
        "device": device_name(device),
        "gpu": device.type != "cpu",
        "bfloat16": not bfloat16_reason,
        "bfloat16_reason": bfloat16_reason,
        "compile": not reason,
        "compile_reason": reason,
    }


def device_name(device: torch.device) -> str:
    """A name for people: the GPU's, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"


# Dense bfloat16 products with float32 accumulation, in TFLOP/s, from the makers' data sheets; the
# first name that occurs in the device's counts.
PEAK_TFLOPS: dict[str, float] = json.loads(Path(__file__).with_name("peaks.json").read_bytes())


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its data sheet, None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def provenance() -> dict[str, Any]:
    """Commit and versions, for results that should be reproducible."""
    return {
        "commit": commit(),
        "ropepp": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+`` for uncommitted changes of the
    package (results beside it are none); None outside one."""
    here = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # An installed copy may lie in an environment inside somebody else's checkout.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says may be the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1])
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def no_bfloat16(device: torch.device) -> str:
    """Why a device has no bfloat16 products in hardware; empty if it has."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return "" if supported else "GPU has no bfloat16"
    if device.type != "cpu":
        return ""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    supported = supported or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "" if supported else "processor has no bfloat16 instructions (AVX512-BF16 or AMX)"


def compile_reason(device: torch.device) -> str:
    """Why torch.compile does not work on a device; empty if it does."""
    try:
        x = torch.ones(64, device=device)
        torch.compile(lambda y: (y * 2).relu().sum())(x)
    except Exception as error:  # any failure means: train without
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return ""
