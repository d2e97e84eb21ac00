"""scripts/gpu_check on a CPU: the driver against workers that hang and crash, the measuring parts
with toy sizes, and a rehearsal."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
import gpu_device
import gpu_kernels
import gpu_loss
import gpu_table
import gpu_training
import gpu_worker
from ropepp.model import Transformer
from ropepp.model.kernels import BACKENDS, Backend
from ropepp.model.loss import cross_entropy_sum
from ropepp.model.positions import RoPEppEC

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

# Says what a worker would: a figure for each stage, and does what the stage's name says.
FAKE = """\
import json, os, sys, time
given = json.loads(sys.argv[1])
def emit(**what):
    print(json.dumps(what), flush=True)
for number, name in enumerate(given["stages"]):
    emit(event="stage", stage=name, until=time.time() + (0.3 if name == "decode" else 30), cases=2)
    for case in range(given["skip"] if number == 0 else 0, 2):
        emit(event="case", stage=name, case=f"case {case}", number=case)
        if case == 0 and name == "parity":
            os._exit(3)
        if case == 0 and name == "decode":
            time.sleep(60)
        what = dict(stage=name, table="", case=f"case {case}", on="nothing")
        emit(event="figure", **what, name="value", value=case + 0.5, unit="s")
    emit(event="end", stage=name)
"""


def options(out: Path, *stages: str, seconds: float = 60.0) -> argparse.Namespace:
    found = gpu_check.parse([f"--out={out}", f"--seconds={seconds}", "--rehearse"])
    found.stages = list(stages)
    return found


def run_fake(
    monkeypatch: pytest.MonkeyPatch, out: Path, code: str, *stages: str, seconds: float = 60.0
) -> tuple[gpu_check.Progress, list[str]]:
    """What the driver makes of a worker with this code; the figures that it wrote."""
    (out / "gpu_worker.py").write_text(code)
    monkeypatch.setattr(gpu_check, "SCRIPTS", out)
    progress = gpu_check.measure(options(out, *stages, seconds=seconds), lambda progress: None)
    progress.finish(list(stages))
    lines = map(json.loads, (out / "figures.jsonl").read_text().splitlines())
    return progress, [f"{line['stage']} {line['case']}" for line in lines]


def test_later_measurements_follow_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    progress, found = run_fake(monkeypatch, tmp_path, FAKE, "ceilings", "parity", "speed")
    said = "failed: case 0: the process ended with code 3"
    assert progress.status == {"ceilings": "ok", "parity": said, "speed": "ok"}
    assert found == [
        "ceilings case 0", "ceilings case 1", "parity case 1", "speed case 0", "speed case 1",
    ]  # fmt: skip


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = time.monotonic()
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    monkeypatch.setattr(gpu_check, "GRACE", 0.01)
    progress, found = run_fake(monkeypatch, tmp_path, FAKE, "decode", "flex")
    assert progress.status["decode"].startswith("failed: case 0: ended ")
    assert progress.status["flex"] == "ok"
    assert found == ["decode case 1", "flex case 0", "flex case 1"]
    assert time.monotonic() - began < 20


def test_the_end_comes_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = time.monotonic()
    late = FAKE.replace("0.3 if", "30 if")
    progress, _ = run_fake(monkeypatch, tmp_path, late, "ceilings", "decode", "flex", seconds=8)
    assert time.monotonic() - began < 8
    assert progress.status["ceilings"] == "ok"
    assert progress.status["decode"].startswith("failed: case 0: ended ")
    assert progress.status["flex"] == "not reached"


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "figures.jsonl").touch()
    progress, found = run_fake(monkeypatch, tmp_path, "import nothing_of_this_name", "parity")
    assert progress.status == {"parity": "failed: start: the process ended with code 1"}
    assert found == []


def test_stages_are_cut_between_measurements(
    monkeypatch: pytest.MonkeyPatch, toy: gpu_device.Bench
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_worker, "emit", lambda **what: said.append(what))

    def slow() -> Any:
        time.sleep(0.8)
        yield "value", 1.0, "s"

    def wrong() -> Any:
        yield "value", 2.0, "s"
        raise ValueError("no\ngood")

    cases = [gpu_device.Case(name, slow, compiles=False) for name in "abc"]
    gpu_worker.run_stage("speed", cases, time.time() + 1.2, 0, toy, "here")
    assert said[-1] == {"event": "cut", "stage": "speed", "done": 1, "cases": 3}
    said.clear()
    cases = [gpu_device.Case("x", wrong), *cases]
    gpu_worker.run_stage("speed", cases, time.time() + 60, 0, toy, "here")
    found = [(x["event"], x["case"], x["value"]) for x in said if "value" in x]
    assert found[:2] == [("figure", "x", 2.0), ("error", "x", "ValueError: no\ngood")]
    assert [case for _, case, _ in found[2:]] == ["a", "b", "c"]
    assert said[-1] == {"event": "end", "stage": "speed"}


@pytest.fixture
def toy(tmp_path: Path) -> gpu_device.Bench:
    return gpu_device.bench(True, tmp_path)


def test_a_wrong_backend_is_found(toy: gpu_device.Bench) -> None:
    sdpa = BACKENDS["sdpa"]
    heads = gpu_kernels.heads_of(toy.scale.models["376m"])["EC"]
    good = {name: value for name, value, _ in gpu_kernels.compare(toy, sdpa, heads)}
    assert set(good) == {*gpu_kernels.KINDS, "twice the same bits"}
    assert all(0 < good[kind] < 1e-2 for kind in gpu_kernels.KINDS)
    wrong = Backend("wrong", sdpa.refuse, lambda r: (1.02 * sdpa.forward(r)[0], None))
    with pytest.raises(AssertionError, match="documents, T < S"):
        list(gpu_kernels.compare(toy, wrong, heads))
    factors = itertools.cycle([1.0, 1.005])
    restless = Backend(
        "restless", sdpa.refuse, lambda r: (next(factors) * sdpa.forward(r)[0], None)
    )
    found = dict(x[:2] for x in gpu_kernels.compare(toy, restless, heads, ("rows",)))
    assert found["twice the same bits"] == "no (rows: out, dq, dk, dv)"


def test_refusals_are_listed(toy: gpu_device.Bench) -> None:
    heads = gpu_kernels.heads_of(toy.scale.models["376m"])["RoPE"]
    found = list(gpu_kernels.compare(toy, "varlen", heads))
    assert found == [("refuses all", "it needs CUDA tensors, and these are on cpu", "")]


def test_the_loss_takes_the_rows_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = gpu_loss.loss.losses_and_gradient

    def count(logits: Any, *rest: Any) -> Any:
        seen.append(len(logits))
        return whole(logits, *rest)

    monkeypatch.setattr(gpu_loss.loss, "losses_and_gradient", count)
    hidden, weight = torch.randn(40, 8), torch.randn(32, 8)
    with gpu_loss.chunks_of(16):
        cross_entropy_sum(hidden, weight, torch.zeros(40, dtype=torch.int64))
    assert seen == [16, 16, 8]


@pytest.mark.parametrize("whole", [False, True])
def test_pairs_are_those_of_the_loader(whole: bool) -> None:
    data = gpu_training.MadeDocuments(97, 6, whole, rows=4, length=64)
    data.rows = {"train": data.open("train")}
    sizes = []
    for step in range(5):
        rows = data.order().rows(4 * step, 4 * step + 4)
        batch = data.rows["train"].batch(rows)
        assert data.pairs(step) == int((batch["positions"] + 1).sum())
        assert sum(data.documents(step)) == 4 * 64
        sizes += data.documents(step)
    assert len(set(sizes)) > 20 or whole
    assert (len(sizes) == 20) == whole


def test_models_are_drawn_where_they_are(toy: gpu_device.Bench) -> None:
    config = toy.scale.models["376m"]
    with gpu_device.drawn_on_device():
        model = Transformer(config, RoPEppEC())
    assert torch.equal(model.norm.weight, torch.ones(config.hidden_size))
    assert 0.9 < model.lm_head.weight.std() / config.init_std < 1.1
    assert not torch.equal(model.lm_head.weight, Transformer(config, RoPEppEC()).lm_head.weight)


def test_the_published_sizes() -> None:
    found = [gpu_device.load_config(size).hidden_size for size in gpu_device.SIZES]
    assert found == [1024, 1536]


def test_the_page() -> None:
    def figure(case: str, name: str, value: float | str, unit: str = "") -> dict[str, Any]:
        where = {"stage": "speed", "table": "loss", "on": "a card, torch 9"}
        return {**where, "case": case, "name": name, "value": value, "unit": unit}

    figures = [
        figure("chunked", "time", 12.34567, "ms"),
        figure("chunked", "tokens/s", 123456.7),
        figure("liger", "tokens/s", float("nan")),
        figure("liger", "time", 8.0, "ms"),
        figure("liger", "why", 50 * "x"),
    ]
    page = gpu_table.page("a command", "abc", {"speed": "ok"}, figures, {"speed": 2.4})
    assert "`a command`\non a card, torch 9, commit abc." in page
    assert "| speed | ok | 2 s |" in page
    table = page.partition("## speed, loss\n\n")[2].splitlines()
    assert table == [
        "| | time | tokens/s |",
        "| --- | ---: | ---: |",
        "| chunked | 12.3 ms | 123,457 |",
        "| liger | 8 ms | nan |",
        "",
        f"* liger, why: {50 * 'x'}",
    ]


def rehearse(folder: Path, *stages: str) -> dict[str, str]:
    """Runs the script from elsewhere, with neither the package nor its folder on the path; returns
    how each stage ended."""
    # However busy the machine is; without a GPU it takes one minute of a processor.
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--seconds", "900", "--rehearse"]
    command += ["--out", str(folder / "out"), *stages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (folder / "out" / "log.txt").read_text()
    page = (folder / "out" / "gpu.md").read_text()
    assert page in done.stdout
    rows = [line.split("|") for line in page.partition("## ")[0].splitlines()[7:] if line]
    return {row[1].strip(): row[2].strip() for row in rows}


@pytest.mark.slow
@pytest.mark.extra
def test_a_short_rehearsal(tmp_path: Path) -> None:
    wanted = ("ceilings", "parity", "decode", "776m", "flex")
    assert rehearse(tmp_path, "--stages", *wanted) == dict.fromkeys(wanted, "ok")
    lines = [json.loads(x) for x in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert all(line["on"].endswith(f"torch {torch.__version__}") for line in lines)
    steps = [line for line in lines if line["stage"] == "776m" and line["name"] == "step"]
    assert len(steps) == 4
    assert all(line["value"] > 0 and line["unit"] == "ms" for line in steps)


@pytest.mark.slow
@pytest.mark.extra
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "--fit")
    assert found == dict.fromkeys((*gpu_check.STAGES, "fit"), "ok")
    lines = [json.loads(x) for x in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    first = {x["name"]: x["value"] for x in lines if x["stage"] == "376m" and "x 48" in x["case"]}
    assert "waits" in first
    assert (tmp_path / "out" / "profile.txt").read_text().count("\n") > 10


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
