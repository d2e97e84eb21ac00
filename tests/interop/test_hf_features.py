"""What people do with a model of transformers, on our own class as on a Llama."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_models import CONFIG, exported, label, small, some_ids
from ropepp.interop import load_pretrained
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import ALiBi, FoPE, NoPE, Position, Pythia, RoPEppEC, RoPEppEH

transformers = pytest.importorskip("transformers")

from helpers.hf_models import decode, load  # noqa: E402
from ropepp.interop.hf import RoPEppModel, wrapped  # noqa: E402

KINDS: list[tuple[Position, str]] = [
    (RoPEppEC(), "ropepp"),
    (RoPEppEC(), "llama"),
    (RoPEppEH(), "ropepp"),
    (ALiBi(), "ropepp"),
    (FoPE(), "ropepp"),
    (NoPE(), "ropepp"),
    (Pythia(), "ropepp"),
]
every_kind = pytest.mark.parametrize(
    ("position", "form"), KINDS, ids=lambda x: x if isinstance(x, str) else label(x)
)


@pytest.fixture
def there(position: Position, form: str, tmp_path: Path) -> Any:
    return load(exported(small(position), tmp_path / "out", form))


@pytest.fixture
def model(position: Position) -> Transformer:
    return small(position)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@every_kind
def test_packed_documents_see_themselves_alone(there: Any, model: Transformer) -> None:
    ids = some_ids(1, 30)
    lengths = (7, 1, 14, 8)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = there(ids, position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1))
    assert not torch.allclose(packed, model(ids), atol=1e-2)
    labels = ids.clone()
    labels[:, torch.tensor(lengths).cumsum(0)[:-1]] = -100
    loss = there(ids, position_ids=positions, labels=labels, use_cache=False).loss
    apart = [
        there(x, labels=x).loss * (x.shape[1] - 1) for x in ids.split(lengths, 1) if len(x[0]) > 1
    ]
    assert loss.item() == pytest.approx(sum(apart).item() / (30 - len(lengths)), abs=1e-5)


@every_kind
def test_kernels_masks_and_inputs_agree(
    there: Any, model: Transformer, position: Position, form: str, tmp_path: Path
) -> None:
    ids, mask = some_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    eager = load(tmp_path / "out", attn_implementation="eager")
    assert there.config._attn_implementation == "sdpa"
    with torch.no_grad():
        want = there(ids, attention_mask=mask)
        found = eager(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        base = there.base_model(ids, attention_mask=mask, output_hidden_states=True)
        embedded = there(inputs_embeds=there.get_input_embeddings()(ids), attention_mask=mask)
    seen = mask.bool()
    close(found.logits[seen], want.logits[seen])
    close(want.logits[0, 4:], model(ids[:1, 4:])[0])
    assert torch.equal(embedded.logits, want.logits)
    assert torch.equal(there.lm_head(base.last_hidden_state), want.logits)
    assert [len(found.hidden_states), len(found.attentions)] == [CONFIG.num_layers + 1, 2]
    H = model.layout.num_heads
    for weights in found.attentions:
        assert weights.shape == (2, H, 12, 12)
        close(weights[seen.unsqueeze(1).expand(2, H, 12)].sum(-1), torch.ones(20 * H))
        assert not weights[1].triu(1).any()
        assert not weights[0, :, 4:, :4].any()


def test_slopes_reach_the_attention_weights(tmp_path: Path) -> None:
    """Of equal queries and keys alone."""
    model = small(ALiBi())
    for block in model.blocks():
        block.self_attn.q_proj.weight.zero_()
    there = wrapped(model, 64)
    there.set_attn_implementation("eager")
    weights = there(some_ids(1, 6), output_attentions=True).attentions[0][0, :, -1]
    slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(4)]).unsqueeze(1)
    close(weights, (-slopes * torch.arange(5, -1, -1)).softmax(-1))


@every_kind
def test_resized_embeddings_are_saved_and_read(
    there: Any, model: Transformer, form: str, tmp_path: Path
) -> None:
    ids = some_ids(1, 9)
    there.resize_token_embeddings(64)
    with torch.no_grad():
        want = there(ids).logits
    assert want.shape[-1] == 64
    close(want[..., :50], model(ids))
    there.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, want)
    close(load_pretrained(tmp_path / "again")(ids), want)


@pytest.mark.parametrize("position", [RoPEppEC(), ALiBi()], ids=label)
def test_tied_embeddings_stay_tied(position: Position, tmp_path: Path) -> None:
    config = ModelConfig(50, 32, 2, 4, 2, 48, tied_embeddings=True, init_std=0.2)
    there = load(exported(Transformer(config, position).eval(), tmp_path / "out", "ropepp"))
    assert there.lm_head.weight is there.model.embed_tokens.weight
    there.resize_token_embeddings(60)
    assert there.lm_head.weight is there.model.embed_tokens.weight
    there.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert load_pretrained(tmp_path / "again").config.vocab_size == 60


@every_kind
def test_modules_are_what_adapters_look_for(there: Any) -> None:
    kinds = {
        name.rsplit(".", 1)[-1]: type(module)
        for name, module in there.named_modules()
        if hasattr(module, "weight") and module.weight.ndim == 2
    }
    assert kinds.pop("embed_tokens") is nn.Embedding
    names = ("q", "k", "v", "o", "gate", "up", "down")
    assert kinds == dict.fromkeys([*(f"{x}_proj" for x in names), "lm_head"], nn.Linear)
    blocks = list(there.model.layers)
    assert all(
        isinstance(x, transformers.modeling_layers.GradientCheckpointingLayer) for x in blocks
    )


@every_kind
def test_the_base_model_alone(there: Any, form: str, tmp_path: Path) -> None:
    ids = some_ids(1, 9)
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert form == "llama" or isinstance(base, RoPEppModel)
    with torch.no_grad():
        assert torch.equal(there.lm_head(base(ids).last_hidden_state), there(ids).logits)


@every_kind
def test_the_trainer_trains_evaluates_and_predicts(there: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in some_ids(8, 12).tolist()]
    settings = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collate: Callable[[Any], Any] = transformers.default_data_collator
    trainer = transformers.Trainer(
        there, settings, train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    found = trainer.predict(rows)
    assert found.predictions.shape == (8, 12, 50)


@pytest.mark.parametrize("position", [RoPEppEC(), ALiBi(), FoPE()], ids=label)
@pytest.mark.parametrize("form", ["ropepp"])
def test_the_whole_graph_compiles(there: Any) -> None:
    ids = some_ids(2, 12)
    with torch.no_grad():
        want = there(ids, use_cache=False).logits
        compiled = torch.compile(there, fullgraph=True, backend="eager")
        close(compiled(ids, use_cache=False).logits, want)


@every_kind
def test_generation_of_a_bfloat16_model(there: Any, position: Position, tmp_path: Path) -> None:
    rounded = load(tmp_path / "out", dtype=torch.bfloat16)
    ids = some_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        exact = there(ids).logits
        assert (rounded(ids).logits.float() - exact).norm() / exact.norm() < 0.03
    want = decode(rounded, ids, mask, use_cache=False)
    assert decode(rounded, ids, mask).shape == want.shape


def test_wrapping_shares_the_tensors() -> None:
    model, ids = small(RoPEppEC()), some_ids(2, 12)
    there = wrapped(model, 64)
    assert there.config.max_position_embeddings == 64
    assert there.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with torch.no_grad():
        close(there(ids).logits, model(ids))


def test_a_folder_of_the_class_names_its_base(tmp_path: Path) -> None:
    folder = exported(small(ALiBi()), tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["auto_map"]["AutoModel"] == "modeling_ropepp.RoPEppModel"
