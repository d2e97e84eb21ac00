"""What studies measure of a run, and the backends and beginnings that they bring along."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import study_measures
import warm
from helpers.small_models import CONFIG
from ropepp.data.loading.datamodule import CorpusDataModule
from ropepp.interop.saved import SavedModel
from ropepp.model import kernels
from ropepp.model.kernels import attention
from ropepp.model.positions import FoPE, RoPE, RoPEppEC, RoPEppEH
from ropepp.model.transformer import Transformer
from ropepp.train.evaluation import model_inputs

SCRIPTS = Path(warm.__file__).parent


def trained(model: Transformer, data: str, **arguments: Any) -> SavedModel:
    config = {"data": {"class_path": data, "init_args": arguments}}
    return SavedModel(model, Path("run"), Path("run"), 1, config)


@pytest.fixture
def of_text(corpus: Path) -> SavedModel:
    model = Transformer(replace(CONFIG, vocab_size=257), RoPEppEC()).eval().requires_grad_(False)
    return trained(model, "CorpusDataModule", corpus=str(corpus), sequence_length=32)


def test_text_by_position(of_text: SavedModel) -> None:
    position = of_text.model.position
    found = study_measures.text(of_text)
    assert of_text.model.position == position
    assert set(found["loss"]) == {"plain", "pi", "ntk", "yarn"}
    own = found["loss"]["plain"]
    assert list(own) == ["0", "16", "32", "64", "128", "within", "beyond", "excess"]
    # Octaves weighted by their sizes are the whole.
    assert (own["0"] + own["16"]) / 2 == pytest.approx(own["within"], abs=2e-5)
    beyond = (32 * own["32"] + 64 * own["64"] + 128 * own["128"]) / 224
    assert beyond == pytest.approx(own["beyond"], abs=2e-5)
    # By other means: the same documents, cut at the end, one after another.
    ids = study_measures.beginnings(of_text.corpora[0], 32, 256).ids
    losses = [of_text.model.evaluate(row[None, :32], row[None, 1:33])[0] for row in ids]
    assert torch.stack(losses).mean().item() == pytest.approx(own["within"], abs=2e-5)
    # A token at a time: each target behind the window that has it in its second half.
    alone = []
    for at in range(32, 256):
        start = 16 * ((at - 16) // 16)
        window = ids[:, start : at + 1]
        alone.append(of_text.model.evaluate(window, ids[:, start + 1 : at + 2])[0][:, -1])
    assert found["window"] == pytest.approx(torch.stack(alone).mean().item(), abs=2e-5)
    for name, spans in found["loss"].items():
        assert spans["excess"] == pytest.approx(spans["beyond"] - found["window"], abs=2e-5), name


def test_ways_to_stretch() -> None:
    methods = study_measures.stretched(RoPEppEH(theta=100.0), 32, 64)
    slowest = {name: own.frequencies(32)[-1].item() for name, own in methods.items()}
    assert slowest["pi"] == pytest.approx(slowest["plain"] / 8)
    assert slowest["ntk"] == pytest.approx(slowest["plain"] / 8, rel=1e-5)
    assert methods["ntk"].frequencies(32)[0] == 1
    assert slowest["yarn"] == pytest.approx(slowest["plain"] / 8)
    assert all(type(own) is RoPEppEH for own in methods.values())
    assert list(study_measures.stretched(FoPE(), 32, 64)) == ["plain"]


def test_recall_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_measures, "ROWS", 8)
    model = Transformer(replace(CONFIG, vocab_size=64), RoPE()).eval().requires_grad_(False)
    saved = trained(
        model, "RecallDataModule", pairs=4, vocab_size=64, sequence_length=32,
        global_batch_size=4, micro_batch_size=4, seed=0,
    )  # fmt: skip
    found = study_measures.recall(saved)
    assert found["chance"] == 1 / 21
    plain = found["accuracy"].pop("plain")
    assert {n: list(own) for n, own in plain.items()} == {
        "4": ["1x", "2x", "4x", "8x"], "2": ["1x", "4x"], "8": ["1x", "4x"],
    }  # fmt: skip
    assert [list(own) for own in found["accuracy"].values()] == 3 * [["4"]]
    # By other means: every question by itself.
    rows = study_measures.RecallRows(128, 4, 64, 8, None, 0, study_measures.STREAM)
    batch = rows.batch(range(8))
    counts: dict[bool, list[bool]] = {False: [], True: []}
    for ids, targets in zip(batch["input_ids"], batch["targets"], strict=True):
        likeliest = model.forward(ids[None]).argmax(-1)[0]
        for at in (targets >= 0).nonzero().flatten().tolist():
            far = at - ids.tolist().index(int(ids[at])) >= 32
            counts[far].append(bool(likeliest[at] == targets[at]))
    right = {far: sum(own) / len(own) for far, own in counts.items()}
    assert found["far"]["plain"] == pytest.approx(right[True], abs=1e-5)
    own = found["octaves"]["4x"]
    near = [own[low] for low in ("1", "2", "4", "8", "16")]
    assert [sum(x) for x in zip(*near, strict=True)] == [sum(counts[False]), len(counts[False])]
    assert sum(asked for _, asked in own.values()) == 8 * 4


def test_what_a_continuation_begins_with(of_text: SavedModel) -> None:
    config = of_text.config["data"]["init_args"] | {"global_batch_size": 1, "micro_batch_size": 1}
    saved = trained(of_text.model, "CorpusDataModule", **config)
    found = study_measures.longer(saved)
    assert list(found["loss"]) == ["10000", "100000"]
    rows = CorpusDataModule(**(config | {"sequence_length": 128})).open("validation")
    batch = rows.batch(range(len(rows)))
    nll, _ = saved.model.evaluate(*model_inputs(batch))
    mean = nll.double().sum() / (batch["targets"] != -100).sum()
    assert found["loss"]["10000"] == pytest.approx(mean.item(), abs=2e-5)
    assert found["loss"]["100000"] != found["loss"]["10000"]


def test_heads_that_are_taken_out(of_text: SavedModel) -> None:
    before = {name: x.clone() for name, x in of_text.model.state_dict().items()}
    found = study_measures.heads(of_text)
    for name, x in of_text.model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert found["heads"] == {"real": 4, "imaginary": 4}
    # EC without its imaginary heads is the RoPE of its weights.
    D = CONFIG.head_dim
    model = Transformer(replace(CONFIG, vocab_size=257), RoPE()).eval().requires_grad_(False)
    state = dict(before)
    for name in state:
        if name.endswith("o_proj.weight"):
            state[name] = state[name].unflatten(1, (-1, 2, D))[:, :, 0].flatten(1)
    model.load_state_dict(state)
    plain = study_measures.heads(replace(of_text, model=model))
    without = found["loss"] + found["imaginary"]["removed"]
    assert plain["loss"] == pytest.approx(without, abs=1e-5)
    assert "imaginary" not in plain
    assert found["real"]["noise_2"] > 0 or found["imaginary"]["noise_2"] > 0


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_imaginary_heads_that_teach_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those of the whole, and where they stop those of the real heads alone."""
    B, T, H, K, D = 2, 5, 8, 2, 4
    q, k, v = (torch.randn(B, T, n, D, requires_grad=True) for n in (H, K, K))
    weight = torch.randn(B, T, H, D)

    def gradients(out: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((out * weight).sum(), (q, k, v)))

    monkeypatch.setattr(kernels, "BACKENDS", dict(kernels.BACKENDS))  # to which it adds its own
    script = runpy.run_path(str(SCRIPTS / "study_backends.py"))
    plain = attention(q, k, v)
    backend = script["BACKENDS"][f"imaginary_not_into_{name}"]
    out = attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, plain)
    real = torch.tensor([1.0, 0.0]).repeat(H // 2)[:, None]
    whole, of_real = gradients(attention(q, k, v), weight), gradients(plain, weight * real)
    for letter, found, full, part in zip(
        "qkv", gradients(out, weight), whole, of_real, strict=True
    ):
        torch.testing.assert_close(found, part if letter == name else full)


def test_a_run_begins_with_the_weights_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    saved = tmp_path / "seed-12" / "checkpoints"
    saved.mkdir(parents=True)
    for step in (99, 150):
        (saved / f"step-{step:07d}.ckpt").touch()
    result = tmp_path / "seed-12" / "result.json"
    result.write_text('{"steps": 150}')
    monkeypatch.setattr(warm, "run", lambda *arguments: given.append(arguments) or 3)
    argv = ["study_begin.py", "socket", str(tmp_path), "--run=a", "--seed_everything=12"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "study_begin.py"), run_name="__main__")
    assert end.value.code == 3
    init = f"--init_from={saved}/step-0000150.ckpt"
    assert given == [
        ("socket", ["-m", "ropepp.cli", "fit", "--run=a", "--seed_everything=12", init])
    ]
    (saved / "step-0000150.ckpt").unlink()
    with pytest.raises(SystemExit, match=r"ended at step 150.*newest checkpoint is .*0000099.ckpt"):
        runpy.run_path(str(SCRIPTS / "study_begin.py"), run_name="__main__")
    result.unlink()
    with pytest.raises(SystemExit, match=r"seed-12 has no result.json"):
        runpy.run_path(str(SCRIPTS / "study_begin.py"), run_name="__main__")
    assert len(given) == 1
