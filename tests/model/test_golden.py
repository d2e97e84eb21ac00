"""Agreement with the reference implementation: logits 1e-4, loss 1e-5, gradients 1e-4 relative,
tokens exact."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from helpers.golden_data import REPOSITORY, ROOT, expected, folders, tensor, variants
from ropepp.eval.analyze.noise import noisy_queries
from ropepp.generate import generate
from ropepp.interop import load_pretrained
from ropepp.model import ModelConfig, Transformer
from ropepp.model.cache import KVCache
from ropepp.model.folders.published import position, read_settings
from ropepp.model.init import initialize
from ropepp.model.positions import (
    PI,
    FoPE,
    HeadSplit,
    ImaginaryOnly,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    YaRN,
)
from ropepp.model.positions.alibi import slopes_of
from ropepp.train.optim import AdamW
from ropepp.train.schedules import WSD, Constant, Cosine

ALL = folders("mha-", "gqa")


def ours(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("folder", ALL)
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


@pytest.mark.parametrize("folder", ALL)
def test_greedy_tokens(folder: str) -> None:
    want = expected(folder)
    prompt = tensor(want["input_ids"])[:, : int(want["prompt_len"])]
    tokens = generate(load_pretrained(ROOT / folder), prompt, max_new_tokens=16)
    assert tokens.tolist() == torch.cat((prompt, tensor(want["greedy_tokens"])), 1).tolist()


@pytest.mark.parametrize("folder", [f for f in ALL if "fope" not in f])
def test_cache(folder: str) -> None:
    want = expected(folder)
    model = load_pretrained(ROOT / folder)
    cache = KVCache(len(model.layers))
    model(tensor(want["input_ids"])[:, : int(want["prompt_len"])], cache=cache)
    keys, values = (x.transpose(1, 2) for x in cache.layers[0].held)
    assert list(keys.shape) == list(want["cache_key_shape"])
    assert list(values.shape) == list(want["cache_value_shape"])
    if "cache_key_layer0" in want:
        torch.testing.assert_close(keys, tensor(want["cache_key_layer0"]), atol=1e-5, rtol=0)


def with_settings_of(case: str) -> Transformer:
    """The parent folder's weights under a variant's ``config.json``."""
    model = load_pretrained(ROOT / case.split("/")[0])
    model.position = position(read_settings(ROOT / case / "config.json"))
    return model


def check_variant(case: str, model: Transformer, *inputs: Tensor | None) -> None:
    """Logits, loss and two gradient norms; ``inputs`` are positions and document ids."""
    want = expected(case)
    ids = tensor(want["input_ids"])
    logits = model(ids, *inputs)
    torch.testing.assert_close(logits, tensor(want["logits"]), atol=1e-4, rtol=0)
    cut = [x if x is None else x[:, :-1] for x in inputs]
    total, count = model.loss(ids[:, :-1], ids[:, 1:], *cut)
    (total / count).backward()
    assert (total / count).item() == pytest.approx(float(want["loss"]), abs=1e-5)
    for key in (key for key in want if key.startswith("grad_norm.")):
        norm = model.get_parameter(ours(key[10:])).grad.norm().item()
        assert norm == pytest.approx(float(want[key]), rel=1e-4), key


@pytest.mark.parametrize("case", variants("packed", "packed-blockmask"))
def test_packed_rows(case: str) -> None:
    """Positions that restart, with and without hiding other documents."""
    want = expected(case)
    documents = None
    if "block_mask" in want:  # a token's document is the first token that it sees
        documents = tensor(want["block_mask"].argmax(-1))
    check_variant(case, with_settings_of(case), tensor(want["position_ids"]), documents)


@pytest.mark.parametrize("case", variants("theta500k", "pi8", "yarn32"))
def test_context_extension(case: str) -> None:
    want = expected(case)
    model = with_settings_of(case)
    check_variant(case, model)
    if "greedy_tokens" in want:
        start = tensor(expected(case.split("/")[0])["prompt_len"])
        prompt = tensor(want["input_ids"])[:, : int(start)]
        tokens = generate(model, prompt, 16)[:, int(start) :]
        assert tokens.tolist() == want["greedy_tokens"].tolist()


@pytest.mark.parametrize("case", variants("leftpad"))
def test_left_padding_by_document_id(case: str) -> None:
    want = expected(case)
    model = load_pretrained(ROOT / case.split("/")[0])
    ids, mask = tensor(want["input_ids"]), tensor(want["attention_mask"])
    documents = mask - 1
    logits = model(ids, tensor(want["position_ids"]), documents)
    visible = mask.bool()
    want_logits = tensor(want["logits"])
    torch.testing.assert_close(logits[visible], want_logits[visible], atol=1e-4, rtol=0)
    tokens = generate(model, ids, 16, document_ids=documents)[:, ids.shape[1] :]
    assert tokens.tolist() == want["greedy_tokens"].tolist()


@pytest.mark.parametrize("case", variants("noise-real", "noise-imag", "noise-both"))
def test_noise_on_rotated_queries(case: str) -> None:
    want = expected(case)
    model = load_pretrained(ROOT / case.split("/")[0])
    quiet = model(tensor(want["input_ids"]))

    def stored(kind: str, layer: int, shape: torch.Size) -> Tensor:
        return tensor(want[f"unit_noise.{kind[:4]}.layer{layer}"]).transpose(1, 2)

    kinds = {"real": ["real"], "imag": ["imaginary"], "both": ["real", "imaginary"]}
    with ExitStack() as noises:
        for kind in kinds[case.rsplit("-", 1)[1]]:
            noises.enter_context(noisy_queries(model, float(want["noise_std"]), kind, stored))
        logits = model(tensor(want["input_ids"]))
    torch.testing.assert_close(logits, tensor(want["logits"]), atol=1e-4, rtol=0)
    assert torch.equal(model(tensor(want["input_ids"])), quiet)


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
        ("pi8_q_ec", RoPEppEC(scaling=PI(8.0)), 4),
        ("yarn32_q_ec", RoPEppEC(scaling=YaRN(32.0)), 4),
    ],
)
def test_rotary_operation(key: str, spec: RoPE, heads: int) -> None:
    want = expected("rotary-op")
    config = ModelConfig(97, 16 * heads, 1, heads, heads, 8)
    prefix = key[: key.index("q_")]
    table = spec.table(tensor(want["position_ids"]), config)
    torch.testing.assert_close(
        spec.frequencies(16), tensor(want[f"{prefix}inv_freq"]), atol=0, rtol=1e-6
    )
    for got, name in zip(table, ("cos", "sin"), strict=True):
        torch.testing.assert_close(got, tensor(want[prefix + name])[..., :8], atol=1e-6, rtol=0)
    q, k = (tensor(want[name]).transpose(1, 2) for name in ("q", "k"))
    q_out, k_out = spec.build(config, 0)(q, k, table)
    torch.testing.assert_close(q_out.transpose(1, 2), tensor(want[key]), atol=2e-6, rtol=0)
    torch.testing.assert_close(
        k_out.transpose(1, 2), tensor(want[f"{prefix}k_rope"]), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("size", ["376m", "776m"])
def test_fope_constants(size: str) -> None:
    want = expected("fope-init")
    sizes = yaml.safe_load((REPOSITORY / f"configs/model/{size}.yaml").read_text())
    config = ModelConfig(**sizes)
    torch.testing.assert_close(
        FoPE().frequencies(config.head_dim), tensor(want[f"{size}_inv_freq"])[0], atol=0, rtol=1e-6
    )
    layer = FoPE().build(config, 0)
    initialize(layer, seed=0, std=0.02)
    assert list(layer.sin_coef.shape) == list(want[f"{size}_coef_shape"])
    assert not torch.equal(layer.sin_coef, layer.cos_coef)
    rows, columns = tensor(want[f"{size}_unit_rows"]).T
    for coefficients in (layer.sin_coef, layer.cos_coef):
        rest = coefficients.clone()
        rest[:, rows, columns] -= 1.0
        measured = want[f"{size}_coef_noise_std_measured"]
        assert rest.std().item() == pytest.approx(measured.mean(), rel=0.05)


@pytest.mark.parametrize("name", list(expected("alibi-slopes")))
def test_alibi_slopes(name: str) -> None:
    np.testing.assert_allclose(slopes_of(int(name[1:])), expected("alibi-slopes")[name], rtol=1e-6)


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
