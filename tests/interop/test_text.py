"""Exported tokenizers give the ids that the model was trained on."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import processors

from helpers.small_models import exported
from helpers.tokenizer_files import byte_characters as expected_characters
from helpers.tokenizer_files import trained, write_tokenizers
from ropepp.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from ropepp.errors import InputError
from ropepp.generate import generate
from ropepp.generate.text import prompt_ids
from ropepp.interop.saved import open_model
from ropepp.interop.text import byte_characters
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import Position, RoPE, RoPEppEC

transformers = pytest.importorskip("transformers")

import ropepp.interop.hf  # noqa: E402, F401 (so that no code of a folder is asked for)

TEXTS = [
    "The state of the Union is strong: 1,234,567 people can't be wrong.\n\n  \tIndented\r\n",
    "we'LL see   spaces  , ünïcödé, 中文字, emoji 🙂 and \x00\x1f\x7f control",
    "",
    " ",
    "a" * 300 + "banana bandana ananas " * 5,
]


def tokenizer(kind: str, folder: Path) -> tuple[Tokenizer, str]:
    """A tokenizer and where it is."""
    place = kind
    if kind == "bpe":
        train_bpe(TEXTS * 3, 300).save(folder)
        place = str(folder / "tokenizer.json")
    elif kind == "tiktoken":
        place = str(write_tokenizers(folder, TEXTS * 3, 350)[0])
    return load_tokenizer(place), place


def model(position: Position, vocab_size: int = 400) -> Transformer:
    return Transformer(ModelConfig(vocab_size, 32, 2, 4, 2, 48, init_std=0.3), position).eval()


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC()], ids=["llama", "ropepp"])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "tiktoken"])
def test_transformers_gives_the_same_ids(kind: str, position: Position, tmp_path: Path) -> None:
    ours, place = tokenizer(kind, tmp_path)
    out = exported(model(position), tmp_path / "out", tokenizer=place)
    there = transformers.AutoTokenizer.from_pretrained(out)
    assert there.eos_token_id == there.pad_token_id == ours.eot_id
    assert there.bos_token_id == ours.bos_id
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert there(text, add_special_tokens=False).input_ids == ids
        begun = [ours.bos_id, *ids] if kind == "tiktoken" else ids
        assert there(text).input_ids == begun
        assert there.decode(ids) == text
    padded = there(["a", "a b c d"], padding=True)
    assert padded["attention_mask"][0][0] == 0
    assert set(padded.keys()) == {"input_ids", "attention_mask"}
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((out / name).read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (ours.bos_id, ours.eot_id)
    assert not (out / "tokenizer.model").exists()  # others read SentencePiece from it
    again = open_model(out).tokenizer()
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert (again.bos_id, again.eot_id) == (ours.bos_id, ours.eot_id)


def test_a_tokenizer_json_stays_as_it_is(tmp_path: Path) -> None:
    _, place = tokenizer("bpe", tmp_path)
    out = exported(model(RoPE()), tmp_path / "out", "reference", tokenizer=place)
    assert (out / "tokenizer.json").read_bytes() == Path(place).read_bytes()


@pytest.mark.parametrize("template", [None, "<s> $A </s>", "$A </s>"])
def test_transformers_reads_a_prompt_as_it_is_read_here(
    template: str | None, tmp_path: Path
) -> None:
    """Whatever the file puts around a text, and however it was cut and filled."""
    backend = trained(TEXTS, 300)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    if template:
        known = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=known
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    out = exported(model(RoPE()), tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    ours = open_model(out).tokenizer()
    there = transformers.AutoTokenizer.from_pretrained(out)
    plain = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS[:2]:
        expected = prompt_ids(ours, text)
        assert ours.bos_id == expected[0]
        assert there(text).input_ids == plain.encode(text).ids == expected
    assert ours.fingerprint == load_tokenizer(tmp_path / "tokenizer.json").fingerprint


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 257 ids, the model of small 200"):
        exported(model(RoPE(), 200), tmp_path / "out", tokenizer="bytes")
    assert not list(tmp_path.iterdir())


def test_bytes_are_written_as_elsewhere() -> None:
    assert dict(enumerate(byte_characters())) == expected_characters()


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC()], ids=["llama", "ropepp"])
def test_the_pipeline_writes_what_the_model_does(position: Position, tmp_path: Path) -> None:
    network = model(position)
    out = exported(network, tmp_path / "out", tokenizer="bytes")
    pipe = transformers.pipeline("text-generation", str(out), trust_remote_code=True)
    prompts = ["We the people", "Fellow citizens of the Senate"]
    written = pipe(prompts, max_new_tokens=8, do_sample=False, batch_size=2)
    ours = load_tokenizer("bytes")
    for prompt, found in zip(prompts, written, strict=True):
        ids = open_model(out).tokenizer().encode_batch([prompt])
        tokens = generate(network, torch.tensor(ids), 8, stop_ids=[ours.eot_id])
        assert found[0]["generated_text"] == ours.decode(tokens[0].tolist())


def test_a_tokenizer_without_bos_stays_without(tmp_path: Path) -> None:
    train_bpe(TEXTS * 3, 300).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][0] |= {"id": 0}
    special = {**content["added_tokens"][0], "id": len(content["model"]["vocab"]), "content": "<s>"}
    content["added_tokens"].append(special)
    content["model"]["vocab"]["<s>"] = special["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = load_tokenizer(tmp_path / "tokenizer.json", bos="")
    assert ours.bos_id is None
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id is not None
    (tmp_path / "named").mkdir()
    ours.save(tmp_path / "named")
    out = exported(model(RoPE()), tmp_path / "out", tokenizer=tmp_path / "named")
    back = load_tokenizer(out)
    assert (back.bos_id, back.eot_id) == (None, ours.eot_id)
