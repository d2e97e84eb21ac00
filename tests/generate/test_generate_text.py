"""Text from tokens as they come, and the command."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ropepp.cli import main
from ropepp.data.tokenizer import BytesTokenizer
from ropepp.errors import InputError
from ropepp.generate.text import TextStream, continue_texts, prompt_ids
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import RoPE, RoPEppEH

CONFIG = ModelConfig(257, 32, 2, 4, 2, 48, init_std=0.3)
BYTES = BytesTokenizer()


@given(text=st.text(max_size=30), stops=st.lists(st.text("abé\n", min_size=1, max_size=3)))
@settings(deadline=None, max_examples=200)
def test_pieces_are_the_text_before_the_stop_that_is_complete_first(
    text: str, stops: list[str]
) -> None:
    stream = TextStream(BYTES, stops)
    pieces = [stream.push(i) for i in text.encode()]
    pieces.append(stream.end())
    want = text
    for n in range(len(text) + 1):
        ends = [at for at in (text[:n].find(stop) for stop in stops) if at >= 0]
        if ends:
            want = text[: min(ends)]
            break
    assert "".join(pieces) == want


def test_nothing_is_given_out_that_could_change() -> None:
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(i) for i in "é".encode()] == ["", "é"]
    assert [stream.push(ord(c)) for c in "xENT"] == ["x", "", "", "ENT"]
    assert [stream.push(ord(c)) for c in "END"] == ["", "", ""]
    assert stream.finished
    assert stream.push(ord("y")) == stream.end() == ""


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push("é".encode()[0]) == ""
    assert stream.end() == "\ufffd"


def test_end_of_text_ends() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(ord("a")), stream.push(256), stream.push(ord("b"))] == ["a", "", ""]
    assert stream.ids == [ord("a")]


def test_a_batch_is_each_prompt_alone() -> None:
    model, prompts = Transformer(CONFIG, RoPEppEH()).eval(), ["one", "two or three", "x"]
    together, speed = continue_texts(model, BYTES, prompts, 9)
    for prompt, found in zip(prompts, together, strict=True):
        ((alone,), _) = continue_texts(model, BYTES, [prompt], 9)
        assert found == alone
    assert speed.prompt_tokens == 16
    assert (
        speed.cache_bytes == 2 * 2 * 3 * (12 + 8) * 8 * 4
    )  # layers, k and v, rows, tokens, D, float32


def test_an_empty_prompt_needs_a_token_that_begins() -> None:
    with pytest.raises(InputError, match="a prompt is empty"):
        prompt_ids(BYTES, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain model in the published format."""
    path = tmp_path / "model"
    path.mkdir()
    model = Transformer(CONFIG, RoPE())
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": value.contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors")
    settings = {
        "model_type": "llama", "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "rms_norm_eps": 1e-5, "eos_token_id": 256,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings))
    return path


def run(folder: Path, *args: str) -> int:
    return main(
        ["generate", "--ckpt", str(folder), "--tokenizer", "bytes", "--device", "cpu",
         "--max_new_tokens", "5", *args]
    )  # fmt: skip


def test_one_prompt_is_shown_as_it_grows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--prompt", "hello") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("hello")
    assert "KV cache" in shown.err
    assert run(folder, "--prompt", "hello") == 0
    assert capsys.readouterr().out == shown.out


def test_a_file_of_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a\nb", "cd", "e")))
    options = ("--batch_size", "2", "--temperature", "0.8", "--top_p", "0.9", "--out", str(out))
    assert run(folder, "--file", str(prompts), *options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a\nb", "cd", "e"]
    assert all(len(line["tokens"]) <= 5 for line in lines)
    assert run(folder, "--file", str(prompts), *options) == 2
    assert "exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "there is no prompt"), ('{"text": 1}', "line 1: no field 'prompt'; fields are text"),
     ('{"prompt": 1}', "field 'prompt' is int; allowed is a string")],
)  # fmt: skip
def test_bad_files_are_refused(
    folder: Path, tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert run(folder, "--file", str(path)) == 2
    assert words in capsys.readouterr().err


def test_the_dtype_is_that_of_weights_and_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        options = ("--prompt", "hello", "--dtype", dtype, "--max_new_tokens", "1")
        assert run(folder, *options) == 0
        # layers, keys and values, tokens, kv heads, head size
        assert f"KV cache {2 * 2 * 5 * 2 * 8 * size:,} bytes" in capsys.readouterr().err
