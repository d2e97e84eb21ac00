"""Text from tokens as they come, and the command."""

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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
    assert speed.startswith("16 tokens read in ")
    # layers, k and v, rows, tokens, D, float32
    assert speed.endswith(f"; KV cache {2 * 2 * 3 * (12 + 8) * 8 * 4:,} bytes")


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
    ("name", "content", "prompts"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n{"prompt": "c\xc2\x85d"}', 2),
        ("A.JSONL", b'{"prompt": "a"}\n\n', 1),
        ("a.txt", b"\xef\xbb\xbfa\x0cb\r\nc\xe2\x80\xa8d\n\n", 2),
    ],
)
def test_lines_of_prompts_end_with_line_feeds_alone(
    folder: Path, tmp_path: Path, name: str, content: bytes, prompts: int
) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / name).write_bytes(content)
    assert run(folder, "--file", str(tmp_path / name), "--out", str(out)) == 0
    found = [json.loads(line)["prompt"] for line in out.read_text().split("\n")[:-1]]
    assert len(found) == prompts
    assert not any(prompt.startswith("\ufeff") or prompt.endswith("\r") for prompt in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a", "--stop", ""), "--stop is ''"),
        (("--prompt", "\udce9"), "--prompt has half a surrogate pair"),
        (("--file", "latin.txt"), "latin.txt: not UTF-8 at byte 0 (found 0xe9)"),
        (("--prompt", "a", "--out", "latin.txt/a.jsonl"), "latin.txt/a.jsonl cannot be written"),
        (("--prompt", "a", "--out", "latin.txt"), "latin.txt exists"),
        (("--prompt", "a", "--out", "x" * 300), "cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused_before_work(
    folder: Path, tmp_path: Path, options: tuple[str, ...], words: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    monkeypatch.setattr("ropepp.interop.saved.open_model", None)
    assert run(folder, *options) == 2
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"latin.txt", "model"}


def test_answers_are_shown_where_they_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ropepp.files.replacing_file", full)
    assert run(folder, "--prompt", "a", "--prompt", "b", "--out", str(tmp_path / "o.jsonl")) == 2
    shown = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in shown.out.splitlines()] == ["a", "b"]
    assert "o.jsonl cannot be written: No space left on device; free some space" in shown.err


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_weights_that_give_no_numbers_are_an_error(
    folder: Path, value: float, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:] = value
    save_file(weights, folder / "model.safetensors")
    assert run(folder, "--prompt", "a", "--temperature", temperature) == 2
    assert "the model's logits are no finite numbers" in capsys.readouterr().err


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
