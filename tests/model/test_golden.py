"""Agreement with the reference implementation: logits 1e-4, loss 1e-5, gradients 1e-4 relative,
tokens exact."""

import numpy as np
import pytest
import torch

from golden_data import ROOT, expected, folders, tensor, variants
from ropepp.generate import generate
from ropepp.interop import load_pretrained
from ropepp.model.positions import RoPE, RoPEppEC, RoPEppEH
from ropepp.model.positions.rotary import HeadSplit, ImaginaryOnly
from ropepp.train.optim import AdamW
from ropepp.train.schedules import WSD, Constant, Cosine

ROTARY = folders("mha-", "gqa-rope", "gqa-ec", "gqa-eh", "gqa-headsplit", "gqa-inter", "gqa-pythia")


def ours(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("folder", ROTARY)
def test_full_sequence(folder: str) -> None:
    want = expected(folder)
    model = load_pretrained(ROOT / folder)
    ids = tensor(want["input_ids"])

    torch.testing.assert_close(model(ids), tensor(want["logits"]), atol=1e-4, rtol=0)

    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    loss = total / count
    assert count == want["loss_num_valid"]
    assert loss.item() == pytest.approx(float(want["loss"]), abs=1e-5)
    per_label = total.item() / float(want["loss_trainer_num_items"])
    assert per_label == pytest.approx(float(want["loss_trainer"]), abs=1e-5)

    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = [ours(str(name)) for name in want["grad_norm_names"]]
    assert set(names) == gradients.keys()
    for name, norm in zip(names, want["grad_norms"], strict=True):
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for key in (key for key in want if key.startswith("grad.")):
        error = (gradients[ours(key[5:])] - tensor(want[key])).norm() / tensor(want[key]).norm()
        assert error < 1e-4, key

    model.ignore_index = -100
    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    assert (total / count).item() == pytest.approx(float(want["loss_all_targets"]), abs=1e-5)


@pytest.mark.parametrize("folder", ROTARY)
def test_greedy_tokens(folder: str) -> None:
    want = expected(folder)
    prompt = tensor(want["input_ids"])[:, : int(want["prompt_len"])]
    tokens = generate(load_pretrained(ROOT / folder), prompt, max_new_tokens=16)
    assert tokens.tolist() == torch.cat((prompt, tensor(want["greedy_tokens"])), 1).tolist()


@pytest.mark.parametrize("case", variants("packed", "packed-blockmask", "theta500k"))
def test_variant_inputs(case: str) -> None:
    """Positions that restart, documents that are hidden from each other, another theta."""
    folder = case.split("/")[0]
    want = expected(case)
    model = load_pretrained(ROOT / folder)
    if case.endswith("theta500k"):
        model.position = type(model.position)(theta=500000.0)
    ids = tensor(want["input_ids"])
    positions = tensor(want["position_ids"]) if "position_ids" in want else None
    documents = None
    if "block_mask" in want:
        # A token's document is the first token that it sees.
        documents = tensor(want["block_mask"].argmax(-1))
    logits = model(ids, positions, documents)
    torch.testing.assert_close(logits, tensor(want["logits"]), atol=1e-4, rtol=0)

    cut = [x if x is None else x[:, :-1] for x in (positions, documents)]
    total, count = model.loss(ids[:, :-1], ids[:, 1:], *cut)
    (total / count).backward()
    assert (total / count).item() == pytest.approx(float(want["loss"]), abs=1e-5)
    for key in (key for key in want if key.startswith("grad_norm.")):
        norm = model.get_parameter(ours(key[10:])).grad.norm().item()
        assert norm == pytest.approx(float(want[key]), rel=1e-4), key


@pytest.mark.parametrize("folder", folders("mha-rope", "mha-ec", "mha-eh"))
def test_six_optimizer_steps(folder: str) -> None:
    want = expected(f"{folder}/train")
    model = load_pretrained(ROOT / folder).train()
    optimizer = AdamW(lr=5e-4).build(model)
    undecayed = {
        name
        for name, p in model.named_parameters()
        if any(p is q for g in optimizer.param_groups if not g["weight_decay"] for q in g["params"])
    }
    assert undecayed == {ours(str(name)) for name in want["no_weight_decay_names"]}
    for ids, loss, norm in zip(
        tensor(want["batches"]), want["losses"], want["grad_norms"], strict=True
    ):
        total, count = model.loss(ids[:, :-1], ids[:, 1:])
        mean = total / count
        mean.backward()
        assert mean.item() == pytest.approx(loss, abs=1e-5)
        grads = [p.grad for p in model.parameters()]
        assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(norm, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    logits = model(tensor(want["batches"][0]))
    torch.testing.assert_close(logits, tensor(want["final_logits_batch0"]), atol=1e-4, rtol=0)
    for name, norm in zip(want["final_param_names"], want["final_param_norms"], strict=True):
        parameter = model.get_parameter(ours(str(name)))
        assert parameter.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "spec", "heads"),
    [
        ("q_rope", RoPE(), 4),
        ("q_ec", RoPEppEC(), 4),
        ("q_eh", RoPEppEH(), 8),  # the stored q are the projections, half of EH's heads
        ("q_headsplit", HeadSplit(), 4),
        ("q_imagonly", ImaginaryOnly(), 4),
        ("q_interleaved", HeadSplit(interleaved=True), 4),
    ],
)
def test_rotary_operation(key: str, spec: RoPE, heads: int) -> None:
    from ropepp.model.config import ModelConfig

    want = expected("rotary-op")
    config = ModelConfig(97, 16 * heads, 1, heads, heads, 8)
    table = spec.table(tensor(want["position_ids"]), config)
    for got, name in zip(table, ("cos", "sin"), strict=True):
        torch.testing.assert_close(got, tensor(want[name])[..., :8], atol=1e-6, rtol=0)
    q, k = (tensor(want[name]).transpose(1, 2) for name in ("q", "k"))
    q_out, k_out = spec.build(config, 0)(q, k, table)
    torch.testing.assert_close(q_out.transpose(1, 2), tensor(want[key]), atol=1e-6, rtol=0)
    torch.testing.assert_close(k_out.transpose(1, 2), tensor(want["k_rope"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("key", "schedule", "total"),
    [
        ("pretrain_constant_warmup500", Constant(warmup_steps=500), 100000),
        ("decay_wsd_total10000", WSD(decay_steps=9999), 10000),
        ("longctx_cosine_warmup500_total10000", Cosine(warmup_steps=500), 10000),
    ],
)
def test_schedules(key: str, schedule: Constant, total: int) -> None:
    want = expected("schedules")
    got = [schedule.multiplier(int(step), total) for step in want["steps"]]
    np.testing.assert_allclose(got, want[key], atol=1e-12)
