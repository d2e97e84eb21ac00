"""Several processes through the command line: same results at every count, and nothing is lost
when some or all of them die."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import warm_python
from helpers.fit_runs import arguments, curve, finish, fit, metrics, start, wait_for_step
from helpers.golden_data import REPOSITORY
from ropepp.cli import main
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import RoPEppEC
from ropepp.runs.checkpoints import consolidate, read_checkpoint
from ropepp.train.weights import load_weights

pytestmark = pytest.mark.slow
STEPS = 30
SHARDED: dict[str, Any] = {
    "trainer__strategy": "fsdp2",
    "trainer__max_steps": STEPS,
    "data__micro_batch_size": 2,
    "checkpoint__keep": 0,
}
# Float32 sums over processes in another order; no more than this relative to the value.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def logs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with 1, 2 and 4 processes and otherwise the same configuration."""
    folder = tmp_path_factory.mktemp("scale")
    for n in (1, 2, 4):
        finish(start(corpus, folder, f"by-{n}", trainer__devices=n, **SHARDED))
    return folder


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=TOLERANCE)


def checkpoint_of(logs: Path, n: int, step: int) -> Path:
    return logs / "default" / f"by-{n}" / "checkpoints" / f"step-{step:07d}.ckpt"


def test_the_number_of_processes_does_not_matter(corpus: Path, logs: Path, tmp_path: Path) -> None:
    one = curve(logs / "default" / "by-1")
    assert [line["step"] for line in one if "train/loss" in line] == list(range(1, STEPS + 1))
    for n in (2, 4):
        assert_same(curve(logs / "default" / f"by-{n}"), one)
    plain = {**SHARDED, "trainer__strategy": "auto"}
    assert_same(curve(fit(corpus, tmp_path, "plain", **plain)), one)
    ddp = {**SHARDED, "trainer__strategy": "ddp", "trainer__devices": 2}
    finish(start(corpus, tmp_path, "ddp", **ddp))
    assert_same(curve(tmp_path / "default" / "ddp"), one)


def samples(state: Any) -> list[int]:
    """Data positions anywhere in a checkpoint."""
    if isinstance(state, dict):
        own = [state["samples"]] if "samples" in state else []
        return own + [found for value in state.values() for found in samples(value)]
    if isinstance(state, list):
        return [found for value in state for found in samples(value)]
    return []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4)])
def test_resume_with_another_number(
    corpus: Path, logs: Path, tmp_path: Path, before: int, after: int
) -> None:
    assert samples(read_checkpoint(checkpoint_of(logs, before, 15))) == [15 * 8]
    run = tmp_path / "default" / "again"
    saved = checkpoint_of(logs, before, 15)
    shutil.copytree(saved, run / "checkpoints" / saved.name)
    finish(start(corpus, tmp_path, "again", trainer__devices=after, resume="auto", **SHARDED))
    assert_same(curve(run), [line for line in curve(logs / "default" / "by-1") if later(line, 15)])
    last = read_checkpoint(run / "checkpoints" / f"step-{STEPS:07d}.ckpt")
    assert samples(last) == [STEPS * 8]


def later(line: dict[str, Any], step: int) -> bool:
    return line["step"] > step


def test_one_file_of_shards(
    corpus: Path, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Consolidated weights are the shards' bits and the single process's values; training goes on
    from the file in one process, and from a single process's file in shards."""
    files = {}
    for n in (1, 2):
        files[n] = tmp_path / f"{n}.ckpt"
        assert (
            main(["checkpoint", "consolidate", str(checkpoint_of(logs, n, 15)), str(files[n])]) == 0
        )
    config = ModelConfig(257, 32, 2, 4, 2, 48)
    model = Transformer(config, RoPEppEC())
    load_weights(model, checkpoint_of(logs, 2, 15))
    whole = {n: torch.load(file, weights_only=True)["state_dict"] for n, file in files.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[2][f"network.{name}"])
        torch.testing.assert_close(tensor, whole[1][f"network.{name}"], rtol=0, atol=1e-5)

    expected = [line for line in curve(logs / "default" / "by-1") if later(line, 15)]
    plain = {**SHARDED, "trainer__strategy": "auto"}
    assert_same(curve(fit(corpus, tmp_path, "single", ckpt_path=files[2], **plain)), expected)
    process = start(
        corpus, tmp_path, "from-single", ckpt_path=files[1], trainer__devices=2, **SHARDED
    )
    finish(process)
    assert_same(curve(tmp_path / "default" / "from-single"), expected)

    refused = fit_code(corpus, tmp_path, ckpt_path=checkpoint_of(logs, 2, 15), **plain)
    assert refused == 2
    assert "a sharded checkpoint, and trainer.strategy is 'auto'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exists"):
        consolidate(checkpoint_of(logs, 2, 15), files[2])


def fit_code(corpus: Path, logs: Path, **changes: Any) -> int:
    return main(arguments(corpus, logs, "refused", **changes))


def test_written_while_training_goes_on(corpus: Path, logs: Path, tmp_path: Path) -> None:
    changes = {**SHARDED, "trainer__devices": 2, "trainer__strategy": "FSDP2Strategy"}
    changes["trainer__strategy.asynchronous_save"] = True
    finish(start(corpus, tmp_path, "async", **changes))
    run = tmp_path / "default" / "async"
    assert curve(run) == curve(logs / "default" / "by-2")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step-{step:07d}.ckpt" for step in range(5, STEPS + 1, 5)]
    config = ModelConfig(257, 32, 2, 4, 2, 48)
    models = [Transformer(config, RoPEppEC()) for _ in range(2)]
    load_weights(models[0], run / "checkpoints" / "step-0000015.ckpt")
    load_weights(models[1], checkpoint_of(logs, 2, 15))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


KILLS_IN_SAVE = """
import os, sys
from torch.distributed.checkpoint import FileSystemWriter
from ropepp.cli import main
# The first process writes the index when all shards are there: die just before.
FileSystemWriter.finish = lambda *args, **kwargs: os.kill(os.getpid(), 9)
if __name__ == "__main__":
    sys.exit(main())
"""


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(process: Any) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.extra
def test_survives_everything(corpus: Path, logs: Path, tmp_path: Path) -> None:
    """One run whose processes are killed one by one, all at once, in the middle of a save, and
    asked to end; each time the same command goes on, and the result is the undisturbed run's."""
    run = tmp_path / "default" / "tried"
    changes = {**SHARDED, "trainer__devices": 2, "resume": "auto"}
    real = sys.executable

    process = start(corpus, tmp_path, "tried", python=real, **changes)  # one process dies
    wait_for_step(process, run, 7)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    kill_all(process)

    process = start(corpus, tmp_path, "tried", **changes)  # all die
    wait_for_step(process, run, 12)
    kill_all(process)

    script = tmp_path / "kills_in_save.py"
    script.write_text(KILLS_IN_SAVE)
    process = start(corpus, tmp_path, "tried", script, real, **changes)
    process.wait(timeout=120)
    kill_all(process)
    assert process.returncode == -signal.SIGKILL
    torn = [path.name for path in (run / "checkpoints").iterdir() if path.suffix == ".tmp"]
    assert len(torn) == 1

    process = start(corpus, tmp_path, "tried", **changes)  # asked to end
    wait_for_step(process, run, 17)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=75)
    stopped = max(line["step"] for line in metrics(run))
    assert f"stopped at step {stopped} on request" in out
    assert stopped < STEPS
    assert (run / "checkpoints" / f"step-{stopped:07d}.ckpt" / ".metadata").exists()
    assert not (run / "result.json").exists()

    finish(start(corpus, tmp_path, "tried", **changes))
    assert curve(run) == curve(logs / "default" / "by-2")
    assert "is finished" in finish(start(corpus, tmp_path, "tried", **changes))


def test_torchrun(corpus: Path, logs: Path, tmp_path: Path) -> None:
    changes = {**SHARDED, "trainer__devices": 2}
    command = [warm_python.python(), "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"]
    command += ["--", "ropepp.cli"]  # else torchrun takes our --logs for one of its own
    command += arguments(corpus, tmp_path, "torchrun", **changes)
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=240)
    assert curve(tmp_path / "default" / "torchrun") == curve(logs / "default" / "by-2")


@pytest.mark.extra
def test_rows_shared_by_processes(corpus: Path, logs: Path, tmp_path: Path) -> None:
    changes = {**SHARDED, "trainer__devices": 2, "trainer__strategy": "FSDP2Strategy"}
    changes["trainer__strategy.context_parallel_size"] = 2
    out = finish(start(corpus, tmp_path, "shared", **changes))
    assert "rows shared by 2 processes: each receives 8,192 bytes of keys and values" in out
    assert_same(curve(tmp_path / "default" / "shared"), curve(logs / "default" / "by-1"))


def test_the_recipe_of_376m_in_small(corpus: Path, tmp_path: Path) -> None:
    """One step of the experiment as it is shipped, with narrower layers and fewer tokens, not
    compiled."""
    process = start(
        corpus,
        tmp_path,
        "small",
        config=REPOSITORY / "configs/experiment/pretrain_376m.yaml",
        **{
            "model__position": REPOSITORY / "configs/position/ec.yaml",
            "model__optimizer.lr": None,
            "trainer__gradient_clip_val": None,
            "trainer__devices": 2,
            "model__schedule.warmup_steps": 0,
            "model__compile": False,
            "trainer__max_steps": 1,
            "data__global_batch_size": 16,
            "experiment": "default",
        },
    )
    out = finish(process)
    assert "bfloat16, 2 x" in out
    (line,) = [line for line in metrics(tmp_path / "default" / "small") if "train/loss" in line]
    assert line["train/loss"] == pytest.approx(5.55, abs=0.2)  # log of the vocabulary
