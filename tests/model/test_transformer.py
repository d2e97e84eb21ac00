"""The whole decoder: documents, positions, precision, initial weights, sizes."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import yaml

from helpers.golden_data import REPOSITORY, ROOT
from helpers.variants import ALL, CONFIG
from ropepp.errors import InputError
from ropepp.generate import generate
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import kv_cache_bytes_per_token, num_parameters, training_flops
from ropepp.model.positions import Position, RoPE, RoPEppEC, RoPEppEH


def published(size: str, position: Position) -> Transformer:
    sizes = yaml.safe_load((REPOSITORY / f"configs/model/{size}.yaml").read_text())
    with torch.device("meta"):
        return Transformer(ModelConfig(**sizes), position)


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
def test_documents_in_a_row_equal_rows_of_their_own(position: Position) -> None:
    model = Transformer(CONFIG, position)
    a, b, c = (torch.randint(50, (1, n)) for n in (5, 9, 2))
    ids = torch.cat((a, b, c), 1)
    documents = torch.tensor([[7] * 5 + [3] * 9 + [4] * 2])
    starts = torch.cat([torch.arange(n) for n in (5, 9, 2)]).unsqueeze(0)
    want = torch.cat([model(x) for x in (a, b, c)], 1)
    torch.testing.assert_close(model(ids, starts, documents), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
def test_padding_is_seen_by_nobody(position: Position) -> None:
    model = Transformer(CONFIG, position)
    ids = torch.randint(50, (2, 12))
    documents = torch.zeros(2, 12, dtype=torch.int64)
    documents[0, :4] = documents[1, 9:] = -1
    positions = torch.arange(12).expand(2, 12).clone()
    positions[0] = (positions[0] - 4).clamp(min=0)
    logits = model(ids, positions, documents)
    torch.testing.assert_close(logits[0, 4:], model(ids[:1, 4:])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1, :9], model(ids[1:, :9])[0], atol=1e-5, rtol=0)
    other = ids.clone()
    other[documents == -1] = 1
    visible = documents >= 0
    assert torch.equal(model(other, positions, documents)[visible], logits[visible])


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC()], ids=lambda p: type(p).__name__)
def test_interrupted_documents_are_exact(position: Position) -> None:
    """Ids in any order, against each document's tokens alone."""
    model = Transformer(CONFIG, position)
    ids, documents = torch.randint(50, (3, 15)), torch.randint(-1, 3, (3, 15))
    positions = torch.randint(0, 40, (3, 15)).sort(1).values
    logits = model(ids, positions, documents)
    for row in range(3):
        for document in range(3):
            own = documents[row] == document
            if own.any():
                want = model(ids[row : row + 1, own], positions[row : row + 1, own])[0]
                torch.testing.assert_close(logits[row, own], want, atol=1e-5, rtol=0)
    total, count = model.loss(ids, ids, positions, documents)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    assert count == 45
    assert total.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("position", ALL, ids=lambda p: type(p).__name__)
def test_the_future_is_not_seen(position: Position) -> None:
    model = Transformer(CONFIG, position)
    ids = torch.randint(50, (2, 12))
    changed = ids.clone()
    changed[:, 8:] = torch.randint(50, (2, 4))
    torch.testing.assert_close(model(changed)[:, :8], model(ids)[:, :8], atol=1e-6, rtol=0)


def test_wrong_shapes_are_named() -> None:
    model, ids = Transformer(CONFIG, RoPE()), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match=r"positions is \(4,\); it must be \(2, 4\)"):
        model(ids, positions=torch.arange(4))


def test_variants_share_every_common_tensor() -> None:
    rope, ec = Transformer(CONFIG, RoPE(), seed=3), Transformer(CONFIG, RoPEppEC(), seed=3)
    other = Transformer(CONFIG, RoPE(), seed=4)
    common = [
        name for name, p in rope.named_parameters() if p.shape == ec.get_parameter(name).shape
    ]
    assert len(common) == len(list(rope.named_parameters())) - CONFIG.num_layers  # all but o_proj
    for name in common:
        assert torch.equal(rope.get_parameter(name), ec.get_parameter(name)), name
        if not name.endswith("norm.weight"):
            assert not torch.equal(rope.get_parameter(name), other.get_parameter(name)), name


def test_initial_weights_have_the_papers_deviation_however_built() -> None:
    config = ModelConfig(500, 64, 1, 4, 2, 96)
    model = Transformer(config, RoPE(), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones(64))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.mean().abs().item() < 0.002, name
    with torch.device("meta"):
        late = Transformer(config, RoPE())
    late.to_empty(device="cpu").initialize(1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, late.get_parameter(name)), name


def test_tied_embeddings_and_qk_norm() -> None:
    tied = Transformer(dataclasses.replace(CONFIG, tied_embeddings=True, qk_norm=True), RoPEppEC())
    plain = Transformer(CONFIG, RoPEppEC())
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert num_parameters(tied) == num_parameters(plain) - 50 * 32 + 2 * CONFIG.num_layers * 8
    assert torch.equal(tied.embed_tokens.weight, plain.embed_tokens.weight)
    with torch.device("meta"):
        late = Transformer(tied.config, RoPEppEC())
    late.to_empty(device="cpu").initialize(0)
    assert late.lm_head.weight is late.embed_tokens.weight
    assert torch.equal(late.embed_tokens.weight, tied.embed_tokens.weight)
    ids = torch.randint(50, (1, 6))
    total, count = tied.loss(ids[:, :-1], ids[:, 1:])
    (total / count).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tied.parameters())


def test_mixed_precision_keeps_float32_weights_and_rotations() -> None:
    ids = torch.randint(50, (2, 16))
    exact = Transformer(CONFIG, RoPEppEC())
    mixed = Transformer(CONFIG, RoPEppEC(), compute_dtype=torch.bfloat16)
    logits = mixed(ids)
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    error = (logits.float() - exact(ids)).norm() / exact(ids).norm()
    assert 0 < error < 0.03
    # A model cast as a whole computes the same: weights are rounded either way, frequencies never.
    cast = Transformer(CONFIG, RoPEppEC()).to(torch.bfloat16)
    assert torch.equal(cast(ids), logits)
    assert RoPE().table(torch.arange(4).unsqueeze(0), CONFIG)[0].dtype == torch.float32


@pytest.mark.parametrize("size", ["376m", "776m", "1.5b"])
@pytest.mark.parametrize(
    ("name", "position"), [("rope", RoPE()), ("ec", RoPEppEC()), ("eh", RoPEppEH())]
)
def test_published_sizes(size: str, name: str, position: Position) -> None:
    want = json.loads((ROOT / "published-config-sizes.json").read_text())[
        f"{size.replace('.', '_')}/{name}"
    ]
    model = published(size, position)
    attention = model.layers[0].self_attn
    assert num_parameters(model) == want["params"]
    for projection in ("q_proj", "k_proj", "o_proj"):
        assert list(getattr(attention, projection).weight.shape) == want[projection]
    assert kv_cache_bytes_per_token(model) == 2 * want["kv_values_per_token"]
    paper = {
        ("376m", "rope"): 375_931_904, ("376m", "eh"): 367_543_296, ("376m", "ec"): 384_320_512,
        ("776m", "rope"): 776_246_784, ("776m", "eh"): 747_935_232, ("776m", "ec"): 804_558_336,
        ("1.5b", "rope"): 1_397_819_392, ("1.5b", "eh"): 1_347_487_744,
        ("1.5b", "ec"): 1_464_928_256,
    }  # fmt: skip
    assert num_parameters(model) == paper[size, name]


@pytest.mark.parametrize(
    ("size", "position", "T", "gigaflops"),
    [
        ("376m", RoPE(), 4096, 1.6689),
        ("376m", RoPEppEC(), 4096, 1.9206),
        ("376m", RoPEppEH(), 32768, 3.0278),
        ("776m", RoPE(), 32768, 7.0992),
        ("776m", RoPEppEC(), 32768, 10.8931),
        ("776m", RoPEppEH(), 4096, 3.7585),
    ],
)
def test_flops_per_token(size: str, position: Position, T: int, gigaflops: float) -> None:
    flops = training_flops(published(size, position), T, T * (T + 1) // 2) / T
    assert flops / 1e9 == pytest.approx(gigaflops, abs=5e-5)


def test_generation_continues_rows_and_draws_reproducibly() -> None:
    model, ids = Transformer(CONFIG, RoPEppEC()).eval(), torch.randint(50, (2, 4))
    greedy = generate(model, ids, 5)
    assert torch.equal(greedy[:, :4], ids)
    assert torch.equal(greedy[:, 4], model(ids)[:, -1].argmax(-1))
    draws = [
        generate(model, ids, 5, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_model_needs_torch_alone() -> None:
    heavy = ["lightning", "jsonargparse", "omegaconf", "torchmetrics", "tensorboard", "tokenizers"]
    code = "import sys, ropepp.model, ropepp.interop, ropepp.generate; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
