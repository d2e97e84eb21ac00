"""Every rotary variant as an ordinary Llama: transformers' own code computes what ours does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_models import CONFIG, LLAMAS, OTHERS, exported, label, saved, small, some_ids
from ropepp.commands import export_model
from ropepp.data.tokenizer import train_bpe
from ropepp.errors import InputError
from ropepp.generate import generate
from ropepp.interop import load_pretrained
from ropepp.interop.export import export
from ropepp.interop.saved import import_checkpoint, open_model
from ropepp.model import ModelConfig, Transformer
from ropepp.model.flops import num_parameters
from ropepp.model.positions import (
    ALiBi,
    FoPE,
    HeadSplit,
    NoPE,
    PartialDoubling,
    Phases,
    Position,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    YaRN,
)

transformers = pytest.importorskip("transformers")

from helpers.hf_models import decode, load  # noqa: E402

every_llama = pytest.mark.parametrize("position", LLAMAS, ids=label)


def test_all_rotary_variants_are_here() -> None:
    tried = {type(position) for position in LLAMAS}
    assert tried == {type(p) for p in LLAMAS + OTHERS if isinstance(p, RoPE)} - {Pythia}


@every_llama
def test_logits_tokens_padding_and_cache(position: Position, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(2, 40)
    there = load(exported(model, tmp_path / "out", "llama"))
    assert type(there).__module__.startswith("transformers.models.")
    with torch.no_grad():
        logits = there(ids).logits
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=0)
    short, long = some_ids(1, 5, 1), some_ids(1, 9, 2)
    want = [generate(model, ids, 12)[0, -12:].tolist() for ids in (short, long)]
    batch = torch.cat((torch.nn.functional.pad(short, (4, 0)), long))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    for use_cache in (True, False):
        found = decode(there, batch, mask, use_cache=use_cache, max_new_tokens=12)
        assert found[:, -12:].tolist() == want
    assert there.config.num_key_value_heads == model.layout.num_kv_heads
    # And back here: as what it was, or as a RoPE with more projections once it was trained.
    back = load_pretrained(tmp_path / "out")
    assert back.position == position
    assert back.config == CONFIG
    torch.testing.assert_close(back(ids), model(ids), atol=1e-5, rtol=0)
    if model.layout.num_heads > model.layout.num_projections:
        with torch.no_grad():
            there.model.layers[1].self_attn.q_proj.weight[0, 0] += 0.01
            there.save_pretrained(tmp_path / "trained")
            want = there(ids).logits
        with pytest.warns(UserWarning, match=r"layers.1.self_attn.q_proj.weight differ by more"):
            back = load_pretrained(tmp_path / "trained")
        assert type(back.position) is RoPE
        torch.testing.assert_close(back(ids), want, atol=1e-5, rtol=0)


@every_llama
def test_bfloat16_differs_by_its_rounding_alone(position: Position, tmp_path: Path) -> None:
    """Relative to the exact logits, weights and activations in bfloat16 cost about as much there as
    here: at most 3%."""
    model, ids = small(position), some_ids(2, 40)
    exact = model(ids)
    folder = exported(model, tmp_path / "out", "llama", dtype=torch.bfloat16)
    there = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in there.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        error = (there(ids).logits.float() - exact).norm() / exact.norm()
    assert error < 0.03


@pytest.mark.parametrize("heads", [(4, 2, 32), (6, 2, 40), (3, 3, 48)])
@pytest.mark.parametrize("position", [PartialDoubling(doubled_share=1 / 3), RoPEppEC()], ids=label)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_that_a_llama_refuses(
    heads: tuple[int, int, int], position: Position, tied: bool, tmp_path: Path
) -> None:
    num_heads, num_kv_heads, width = heads
    config = ModelConfig(
        50, width, 2, num_heads, num_kv_heads, 48, head_size=10, tied_embeddings=tied, init_std=0.2
    )
    if isinstance(position, PartialDoubling):
        position = replace(position, doubled_share=num_kv_heads / num_heads)
    model, ids = Transformer(config, position).eval(), some_ids(2, 30)
    folder = exported(model, tmp_path / "out", "llama")
    settings = json.loads((folder / "config.json").read_text())
    whole = width % model.layout.num_heads == 0
    assert settings["architectures"] == ["LlamaForCausalLM" if whole else "MistralForCausalLM"]
    there = load(folder)
    torch.testing.assert_close(there(ids).logits, model(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(load_pretrained(folder)(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "position",
    [RoPE(), RoPE(scaling=YaRN(4.0, 16)), Phases(phases=(0.0, 180.0)), RoPEppEC(), Phases()],
    ids=label,
)
def test_qk_norm_is_a_qwen3_where_turns_leave_it(
    position: Position, trained: bool, tmp_path: Path
) -> None:
    config = ModelConfig(50, 32, 2, 4, 2, 48, qk_norm=True, init_std=0.2)
    model, ids = Transformer(config, position).eval().requires_grad_(False), some_ids(2, 30)
    if trained:
        for block in model.blocks():
            for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
                norm.weight.copy_(torch.rand(8) + 0.5)
    mixes = any(head.phase % 180 for head in model.layout.heads)
    if trained and mixes:
        with pytest.raises(InputError, match="cannot express qk_norm with phases other than"):
            export(saved(model), tmp_path / "out", "llama")
        assert not list(tmp_path.iterdir())
        there = load(exported(model, tmp_path / "out"))
        assert there.config.model_type == "ropepp"
    else:
        there = load(exported(model, tmp_path / "out"))
        assert there.config.model_type == "qwen3"
    torch.testing.assert_close(there(ids).logits, model(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        load_pretrained(tmp_path / "out")(ids), model(ids), atol=1e-5, rtol=0
    )


class Warped(RoPE):
    """Somebody's own frequencies."""

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
        return super().frequencies(head_dim, device) ** 1.1


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (ALiBi(), r"position ALiBi\(\)"),
        (NoPE(), r"position NoPE\(\)"),
        (FoPE(), "position FoPE"),
        (Pythia(), r"rotary_share 0\.25"),
        (RoPEppEC(rotary_share=0.5), r"rotary_share 0\.5"),
        (Warped(), "position Warped"),
    ],
    ids=label,
)
def test_what_no_llama_computes_is_refused_by_name(
    position: Position, words: str, tmp_path: Path
) -> None:
    model = small(position)
    with pytest.raises(InputError, match=f"a Llama cannot express {words}|Llama cannot.*{words}"):
        export(saved(model), tmp_path / "out", "llama")
    assert not list(tmp_path.iterdir())
    assert export(saved(model), tmp_path / "own", "hf")["model_type"] == "ropepp"


def test_exports_of_equal_runs_state_equal_lengths(tmp_path: Path) -> None:
    scaling = YaRN(4.0, 256)
    found = set()
    for number, position in enumerate([RoPE(scaling=scaling), RoPEppEC(scaling=scaling)]):
        for form in ("llama", "ropepp"):
            folder = tmp_path / f"{number}{form}"
            run = replace(
                saved(small(position)), config={"data": {"init_args": {"sequence_length": 256}}}
            )
            settings = export(run, folder, form, tokenizer=None)
            found.add(settings["max_position_embeddings"])
    assert found == {1024}


def test_the_command_says_what_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(RoPEppEC())
    exported(model, tmp_path / "ec", "ropepp")
    import_checkpoint(tmp_path / "ec", tmp_path / "ec.ckpt")
    for form, folder in (("llama", "a"), ("ropepp", "b")):
        export_model.main([str(tmp_path / "ec.ckpt"), str(tmp_path / folder), "--format", form])
    llama, own = (load(tmp_path / name) for name in "ab")
    before = num_parameters(model)
    after = sum(p.numel() for p in llama.parameters())
    assert after == before + CONFIG.num_layers * 4 * 8 * 32
    assert sum(p.numel() for p in own.parameters()) == before
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"LlamaForCausalLM: {after:,} parameters ({before:,} before: ")
    assert "query matrices of 8 heads, 4 before), KV cache 128 bytes" in out[0]
    assert out[2].startswith(f"RoPEppForCausalLM: {before:,} parameters ({before:,} before: ")


def test_eh_has_half_the_cache(tmp_path: Path) -> None:
    there = load(exported(small(RoPEppEH()), tmp_path / "out", "llama"))
    assert (there.config.num_attention_heads, there.config.num_key_value_heads) == (4, 1)


def test_head_splits_do_not_grow(tmp_path: Path) -> None:
    model = small(HeadSplit())
    there = load(exported(model, tmp_path / "out", "llama"))
    assert sum(p.numel() for p in there.parameters()) == num_parameters(model)


def test_what_other_converters_ask_of_a_folder(tmp_path: Path) -> None:
    """llama.cpp's: its names of keys, ids below the vocabulary's size, no tokenizer.model."""
    position = RoPEppEC(scaling=YaRN(4.0, 64))
    config = ModelConfig(300, 32, 2, 4, 2, 48, init_std=0.2)
    model = Transformer(config, position).eval()
    train_bpe(["some text of a corpus, some more of it"], 280).save(tmp_path)
    options: dict[str, Any] = {"tokenizer": tmp_path / "tokenizer.json"}
    folder = exported(model, tmp_path / "out", "llama", **options)
    settings = json.loads((folder / "config.json").read_text())
    # Where the original length is looked for, with 8192 in its place otherwise.
    assert settings["original_max_position_embeddings"] == 64
    assert settings["rope_scaling"]["rope_type"] == "llama3"
    assert settings["rope_theta"] == 10000.0
    assert settings["head_dim"] * settings["num_attention_heads"] == 64
    words = json.loads((folder / "tokenizer.json").read_text())
    assert words["model"]["type"] == "BPE"
    assert max(words["model"]["vocab"].values()) < settings["vocab_size"]
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "checksums.json"),
    }
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        plain("some text").input_ids
        == open_model(folder).tokenizer().encode_batch(["some text"])[0]
    )


@pytest.mark.parametrize("position", [RoPEppEC(), PartialDoubling(), RoPEppEH()], ids=label)
def test_transformers_generates_in_every_way(position: Position, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(2, 9)
    there = load(exported(model, tmp_path / "out", "llama"))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    want = decode(there, ids, mask)
    assert decode(there, ids, mask, cache_implementation="static").tolist() == want.tolist()
    beams = {"num_beams": 3, "max_new_tokens": 9}
    plain = decode(there, ids, mask, use_cache=False, **beams)
    assert decode(there, ids, mask, **beams).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 5e5), ("rms_norm_eps", 1e-3), ("rope_scaling", None)]
)
def test_what_was_changed_elsewhere_is_not_undone(key: str, value: Any, tmp_path: Path) -> None:
    exported(small(RoPEppEC(scaling=YaRN(4.0, 16))), tmp_path / "out", "llama")
    (tmp_path / "out" / "checksums.json").unlink()
    file = tmp_path / "out" / "config.json"
    settings = json.loads(file.read_text())
    assert isinstance(load_pretrained(file.parent).position, RoPEppEC)
    file.write_text(json.dumps({**settings, key: value}))
    with pytest.warns(UserWarning, match="were changed; read as a Llama"):
        changed = load_pretrained(file.parent)
    assert type(changed.position) is RoPE
    found = {"rope_theta": changed.position.theta, "rms_norm_eps": changed.config.norm_eps}
    assert {**found, "rope_scaling": changed.position.scaling}[key] == value
