"""The measuring parts of scripts/gpu_check, on a CPU with tiny sizes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import training_flops
from ropepp.model.positions import RoPEppEC

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CPU = torch.device("cpu")
TINY = ModelConfig(97, 32, 2, 4, 2, 48)


def test_a_step_is_measured() -> None:
    found = gpu_check.measure(
        TINY, RoPEppEC(), 16, CPU, tokens=64, compiled=False, warmup=1, steps=2
    )
    assert (found.rows, found.length, found.peak) == (4, 16, None)
    assert found.flops == training_flops(Transformer(TINY, RoPEppEC()), 64, 4 * 16 * 17 // 2)
    assert found.seconds > 0
    assert found.memory > 0
    assert " | - | " in found.cells()


def test_steps_change_the_weights_and_leave_no_gradient() -> None:
    model = Transformer(TINY, RoPEppEC(), compute_dtype=torch.bfloat16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gpu_check.training_step(model, 2, 8, CPU, compiled=False)()
    assert all(
        p.grad is None and not torch.equal(p, old)
        for p, old in zip(model.parameters(), before, strict=True)
    )


def test_rows_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def step(model: Any, rows: int, *rest: Any) -> Any:
        tried.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(gpu_check, "training_step", step)
    limit = 3
    found = gpu_check.measure(TINY, RoPEppEC(), 16, CPU, tokens=16 * 11)
    assert found.rows == 2
    assert tried == [11, 5, 2]
    limit = 0
    assert gpu_check.measure(TINY, RoPEppEC(), 16, CPU, tokens=8) is None


def test_the_table() -> None:
    def measured(config: ModelConfig, position: Any, length: int, device: Any) -> Any:
        if length > 4096:
            return None
        return gpu_check.Measurement(2, length, 0.5, 10**14, 1e15, 3 * 2**29)

    lines = list(gpu_check.table({"376m": TINY}, [4096, 32768], CPU, measured))
    assert lines[2] == ("| 376m | RoPE | 4096 | 2 | 500 ms | 16,384 | 200.0 | 20.0% | 1.5 GiB |")
    assert lines[-1] == "| 376m | EH | 32768 | does not fit | - | - | - | - | - |"
    assert {line.count("|") for line in lines} == {10}


def test_the_published_sizes() -> None:
    assert [gpu_check.load_config(size).hidden_size for size in gpu_check.SIZES] == [1024, 1536]


@pytest.mark.skipif(
    torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU"
)
@pytest.mark.parametrize("name", ["gpu_check", "gpu_check.py"])
def test_without_a_gpu_it_stops_at_once(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_check needs a CUDA GPU")
    assert done.stderr.count("\n") == 1
