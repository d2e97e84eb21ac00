"""Our own class of transformers computes what the model does, and does what a Llama can."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import small_models
from helpers.small_models import CONFIG, OTHERS, label, saved, small, some_ids
from ropepp.errors import InputError
from ropepp.generate import generate
from ropepp.interop import load_pretrained
from ropepp.interop.export import export
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import (
    ALiBi,
    FoPE,
    Phases,
    Position,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    YaRN,
)

transformers = pytest.importorskip("transformers")

from helpers.hf_models import decode, load  # noqa: E402
from ropepp.interop.hf import CACHE, RoPEppForCausalLM  # noqa: E402

EVERY = [
    *OTHERS,
    RoPEppEC(),
    RoPEppEC(scaling=YaRN(4.0, 16)),
    RoPEppEH(),
    Phases(phases=(0.0, -30.0)),
]
KINDS = [RoPEppEC(), FoPE(), ALiBi()]
every_kind = pytest.mark.parametrize("position", KINDS, ids=label)
every_position = pytest.mark.parametrize("position", EVERY, ids=label)


def exported(model: Transformer, folder: Path, **options: Any) -> Path:
    """As our own class, whatever else the model may be."""
    return small_models.exported(model, folder, "ropepp", **options)


@every_position
def test_logits_are_equal(position: Position, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(2, 40)
    there = load(exported(model, tmp_path / "out"))
    with torch.no_grad():
        logits = there(ids).logits
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=0)
    back = load_pretrained(tmp_path / "out")
    assert back.position == position
    assert back.config == CONFIG
    torch.testing.assert_close(back(ids), model(ids), atol=1e-5, rtol=0)


@every_position
def test_greedy_tokens_with_and_without_cache_in_a_padded_batch(
    position: Position, tmp_path: Path
) -> None:
    model = small(position)
    there = load(exported(model, tmp_path / "out"))
    short, long = some_ids(1, 5, 1), some_ids(1, 9, 2)
    want = [generate(model, ids, 6)[:, -6:] for ids in (short, long)]
    batch = torch.cat((torch.nn.functional.pad(short, (4, 0)), long))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    for use_cache in (True, False):
        found = decode(there, batch, mask, use_cache=use_cache)[:, -6:]
        assert found.tolist() == torch.cat(want).tolist()
        assert decode(there, long, use_cache=use_cache)[:, -6:].tolist() == want[1].tolist()


@pytest.mark.parametrize("position", [RoPEppEC(), RoPEppEH(), FoPE()], ids=label)
def test_the_cache_holds_what_the_model_says(position: Position, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(3, 7)
    there = load(exported(model, tmp_path / "out"))
    with torch.no_grad():
        cache = getattr(there(ids[:, :4]), CACHE)
        assert cache.layers[0].keys.shape == (3, model.layout.num_kv_heads, 4, 8)
        logits = there(ids[:, 4:], **{CACHE: cache}).logits
    torch.testing.assert_close(logits, model(ids)[:, 4:], atol=1e-5, rtol=0)
    assert there.config.num_key_value_heads == model.layout.num_kv_heads
    assert there.config.num_attention_heads == model.layout.num_heads


@every_kind
@pytest.mark.parametrize("sequences", [1, 3])
def test_beams_reorder_the_cache(position: Position, sequences: int, tmp_path: Path) -> None:
    there, ids = load(exported(small(position), tmp_path / "out")), some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"num_beams": 3, "num_return_sequences": sequences, "max_new_tokens": 9}
    want = decode(there, ids, mask, use_cache=False, **options)
    assert decode(there, ids, mask, **options).tolist() == want.tolist()
    assert want[::sequences].tolist() != decode(there, ids, mask, max_new_tokens=9).tolist()


@every_kind
def test_assisted_decoding_crops_the_cache(
    position: Position, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = load(exported(small(position), tmp_path / "out"))
    ids, crops, crop = some_ids(1, 4).repeat(1, 4), [], transformers.DynamicCache.crop
    monkeypatch.setattr(
        transformers.DynamicCache, "crop", lambda self, n: crops.append(n) or crop(self, n)
    )
    want = decode(there, ids, max_new_tokens=20)
    assert not crops
    never = CONFIG.vocab_size  # an id; before version 5 this way needs one
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": never}
    found = decode(there, ids, max_new_tokens=20, **options)
    assert found.tolist() == want.tolist()
    assert crops


@every_kind
def test_a_static_cache_is_longer_than_its_use(position: Position, tmp_path: Path) -> None:
    there, ids = load(exported(small(position), tmp_path / "out")), some_ids(2, 9)
    mask = torch.ones_like(ids)
    for padding in (0, 4):
        mask[0, :padding] = 0
        want = decode(there, ids, mask)
        assert decode(there, ids, mask, cache_implementation="static").tolist() == want.tolist()


def test_cached_steps_with_padding_equal_one_pass(tmp_path: Path) -> None:
    there = load(exported(small(RoPEppEC()), tmp_path / "out"))
    ids, mask = some_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        want = there(ids, attention_mask=mask).logits
        cache, parts = None, []
        for start, end in ((0, 4), (4, 7), (7, 8)):
            given = {CACHE: cache} if cache is not None else {}
            out = there(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **given)
            parts.append(out.logits)
            cache = getattr(out, CACHE)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[seen], want[seen], atol=1e-5, rtol=0)
    last = there(ids, attention_mask=mask, logits_to_keep=2, use_cache=False)
    torch.testing.assert_close(last.logits, want[:, -2:], atol=1e-6, rtol=0)
    assert getattr(last, CACHE) is None


def test_loss_leaves_out_what_the_model_does(tmp_path: Path) -> None:
    model, ids = small(RoPEppEC(), ignore_index=7), some_ids(2, 30)
    ids[:, 5:8] = 7
    there = load(exported(model, tmp_path / "out"))
    total, count = model.loss(ids[:, :-1], ids[:, 1:])
    labels = ids.clone()
    labels[ids == 7] = -100
    for given in (ids, labels):
        loss = there(ids, labels=given).loss
        assert loss.item() == pytest.approx((total / count).item(), abs=1e-5)
    loss = there(ids, labels=ids, num_items_in_batch=10).loss
    assert loss.item() == pytest.approx(total.item() / 10, abs=1e-4)
    assert there(ids, labels=ids, return_dict=False)[0].ndim == 0


@every_kind
def test_checkpointed_gradients_are_equal(position: Position, tmp_path: Path) -> None:
    folder, ids = exported(small(position), tmp_path / "out"), some_ids(2, 12)
    gradients = []
    for enable in (False, True):
        there = load(folder).train()
        if enable:
            there.gradient_checkpointing_enable()
        out = there(ids, labels=ids)
        assert (getattr(out, CACHE) is None) == enable
        out.loss.backward()
        gradients.append({name: p.grad for name, p in there.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@every_kind
def test_save_pretrained_and_back(position: Position, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(1, 12)
    there = load(exported(model, tmp_path / "out"))
    again = tmp_path / "again"
    there.save_pretrained(again, max_shard_size="10KB")
    assert len(list(again.glob("*.safetensors"))) > 2
    own = {p.name for p in again.glob("*.py")}
    assert own == {"modeling_ropepp.py"}
    for back in (load(again), RoPEppForCausalLM.from_pretrained(again)):
        assert torch.equal(back.eval()(ids).logits, there(ids).logits)
    assert load_pretrained(again).position == position
    torch.testing.assert_close(load_pretrained(again)(ids), model(ids), atol=1e-5, rtol=0)


def test_what_transformers_saves_of_a_llama_is_read(tmp_path: Path) -> None:
    model, ids = small(RoPE(scaling=YaRN(4.0, 16))), some_ids(1, 30)
    load(small_models.exported(model, tmp_path / "out")).save_pretrained(tmp_path / "again")
    back = load_pretrained(tmp_path / "again")
    assert back.position == model.position
    torch.testing.assert_close(back(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC()], ids=label)
def test_tied_embeddings_and_other_sizes(position: Position, tmp_path: Path) -> None:
    config = ModelConfig(50, 32, 2, 4, 2, 48, head_size=12, tied_embeddings=True, init_std=0.3)
    model, ids = Transformer(config, position).eval(), some_ids(1, 12)
    there = load(exported(model, tmp_path / "out"))
    torch.testing.assert_close(there(ids).logits, model(ids), atol=1e-5, rtol=0)
    there.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        back = load_pretrained(tmp_path / folder)
        assert back.lm_head.weight is back.embed_tokens.weight
        torch.testing.assert_close(back(ids), model(ids), atol=1e-5, rtol=0)


def test_bfloat16_rounds_weights_and_nothing_of_the_encoding(tmp_path: Path) -> None:
    model = small(FoPE())
    folder = exported(model, tmp_path / "out", dtype=torch.bfloat16)
    there = load(folder, dtype=torch.bfloat16)
    coefficients = there.model.layers[0].self_attn.position.sin_coef
    assert coefficients.dtype == torch.float32
    assert torch.equal(coefficients, model.layers[0].self_attn.position.sin_coef)
    assert there.model.norm.weight.dtype == torch.bfloat16
    weight = model.layers[1].mlp.up_proj.weight
    assert torch.equal(load_pretrained(folder).layers[1].mlp.up_proj.weight, weight.bfloat16())


@every_kind
def test_a_model_made_from_its_configuration_has_weights(
    position: Position, tmp_path: Path
) -> None:
    config = load(exported(small(position), tmp_path / "out")).config
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    assert fresh.lm_head.weight.std().item() == pytest.approx(0.2, rel=0.1)
    with torch.no_grad():
        assert fresh(some_ids(2, 12)).logits.isfinite().all()


def test_a_folder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(small(RoPEppEC()), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ropepp.interop.hf", None)
    code = (folder / "modeling_ropepp.py").read_text()
    with pytest.raises(ImportError, match=r"pip install 'ropepp\[hf\]'"):
        exec(code, {"__name__": "modeling_ropepp"})


def test_an_existing_folder_stays_and_a_failed_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(small(RoPE()), tmp_path / "out")
    before = (folder / "config.json").read_text()
    with pytest.raises(InputError, match="exists"):
        export(saved(small(RoPEppEC())), folder, "ropepp")
    assert (folder / "config.json").read_text() == before

    def full(path: Path, text: str) -> None:
        assert path.with_name("model.safetensors").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr("ropepp.interop.export.write_text", full)  # of the last file
    with pytest.raises(OSError, match="No space left"):
        export(saved(small(RoPEppEC())), tmp_path / "torn", "ropepp")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
