"""The command: help, start-up cost, and errors that a user can mend."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.corpora import change_record
from helpers.fit_runs import arguments, fit
from helpers.golden_data import REPOSITORY
from ropepp.cli import COMMANDS, main


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", ["prepare", "results"])
def test_light_commands_import_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from ropepp.cli import main\ntry: main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'tokenizers') if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_imports_only_the_standard_library() -> None:
    code = (
        "import sys; from ropepp.cli import main; main(['--help']); "
        "print({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    )
    names = python("-c", code).stdout.strip().splitlines()[-1]
    assert "ropepp" in names
    assert not any(heavy in names for heavy in ("torch", "numpy", "lightning", "jsonargparse"))


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["fly"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("ropepp 0.")
    assert captured.err == (f"error: unknown command 'fly'; allowed: {', '.join(COMMANDS)}\n")


def test_a_reader_that_ends_first_ends_the_command_in_silence(tmp_path: Path) -> None:
    """As in `ropepp ... | head -1`, whether the output is long or is written at the end."""
    for text in ("", "x" * 100_000):
        code = f"import ropepp.commands.probe as p; p.main = lambda args: print({text!r})"
        run = f"{code}; import sys; from ropepp.cli import main; sys.exit(main(['probe']))"
        command = [sys.executable, "-c", run]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141


def test_what_the_machine_forbids_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "x" * 300]) == 2
    assert capsys.readouterr().err == f"error: {'x' * 300}: File name too long\n"


def test_results_of_other_programs_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = (b'{"accuracy": 1}', b"[]", b"\xff", b"", b'{"seed": "a", "variant": []}')
    for number, content in enumerate(contents):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_bytes(content)
    assert main(["results", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert all(f"left out: {tmp_path / str(n) / 'result.json'} " in shown for n in range(5))
    assert f"error: no finished run (result.json of fit) in {tmp_path}" in shown


SIZES = {"vocab_size": 257, "hidden_size": 32, "num_layers": 1, "ffn_size": 16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__network": {**SIZES, "num_heads": 3, "num_kv_heads": 2}}, "num_heads is 3"),
        ({"model__network": {**SIZES, "num_heads": 2, "num_kv_heads": 1},
          "model__position": "RoPEppEH"}, "num_kv_heads 1 must both be even"),
        ({"model__network": {**SIZES, "num_heads": 2, "num_kv_heads": 2, "head_size": 7}},
         "7 of 7 head components"),
        ({"model__network": {**SIZES, "num_heads": 2, "num_kv_heads": 2, "depth": 3}}, "depth"),
        ({"model__position": "RoPE3"}, "is 'RoPE3'; allowed: ALiBi, FoPE, HeadSplit"),
        ({"model__schedule": "Step"}, "model.schedule is 'Step'; allowed: Constant, Cosine, WSD"),
        ({"data": "Corpus"}, "CorpusDataModule"),
        ({"model__position": "RoPE", "model__position.scaling": "PI",
          "model__position.scaling.factor": 0.5}, "scaling factor is 0.5"),
        ({"trainer__callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitr": "x"}}]},
         "EarlyStopping has no argument 'monitr'"),
        ({"model__position": "HeadSplit", "model__position.imaginary_share": 0.3},
         "imaginary_share is 0.3; of 4 heads it can be 0/4, 1/4"),
        ({"model__position": "PartialDoubling", "model__position.doubled_share": 0.25},
         "doubles 1 of 4 heads"),
        ({"model__learning_rate": 1}, "learning_rate"),
        ({"model__optimizer.lr": -1.0}, "lr is -1.0"),
        ({"model__backend": "quantum"}, "quantum"),
        ({"model__schedule": "Constant", "model__schedule.warmup_steps": 30}, "warmup_steps is 30"),
        ({"trainer__max_steps": 0}, "max_steps is 0"),
        ({"trainer__precision": "bf16-mixed"}, "choose model.compute_dtype"),
        ({"trainer__max_stepz": 3}, "max_stepz"),
        ({"trainer__accelerator": "gppu"}, "trainer: You selected an invalid accelerator name"),
        ({"trainer__strategy": "fsdp3"}, "fsdp3"),
        ({"trainer__gradient_clip_val": -1.0}, "trainer.gradient_clip_val is -1.0"),
        ({"data__sequence_length": 10**6}, "1000000"),
        ({"data__micro_batch_size": 3}, "global_batch_size is 8"),
        ({"data__corpus": "no/such/folder"}, "no/such/folder"),
        ({"model__network": {**SIZES, "vocab_size": 100, "num_heads": 2, "num_kv_heads": 2}},
         "vocab_size is 100"),
        ({"checkpoint__every_n_steps": -1}, "every_n_steps is -1"),
        ({"ckpt_path": "no/such/file.ckpt"}, "no/such/file.ckpt"),
        ({"ckpt_path": "last"}, "holds no complete checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_starts_nothing(
    changes: dict[str, object],
    words: str,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = main(arguments(corpus, tmp_path, "bad", **changes))
    error = capfd.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[-1].startswith("error: ")
    assert words in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_debug_shows_the_traceback(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr is -1"):
        main([*arguments(corpus, tmp_path, "bad", model__optimizer__lr=-1.0), "--debug"])


def damaged(corpus: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(corpus, copy)
    return copy


def refusal(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(list(args)) == 2
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_damaged_corpora(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = damaged(corpus, tmp_path)
    (tokens,) = copy.glob("shards/*/train/tokens.bin")
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    fitting = arguments(copy, tmp_path, "bad", data__verify=True)
    assert "tokens.bin" in (error := refusal(capfd, *fitting))
    assert "is damaged" in error
    assert "tokens.bin" in refusal(capfd, *arguments(copy, tmp_path, "bad"))  # when it is read
    tokens.write_bytes(content[:-2])
    assert "tokens.bin" in refusal(capfd, *arguments(copy, tmp_path, "bad"))
    tokens.unlink()
    assert "tokens.bin" in refusal(capfd, *arguments(copy, tmp_path, "bad"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_corpus_with_another_tokenizer_than_the_checkpoints(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fit(corpus, tmp_path, "run", trainer__max_steps=1, checkpoint__every_n_steps=0)
    other = damaged(corpus, tmp_path)
    for meta in other.glob("*/meta.json"):
        change_record(meta, tokenizer_fingerprint="0" * 64)
    error = refusal(
        capfd, "validate", f"--config={run}/config.yaml", "--ckpt_path=last",
        f"--data.corpus={other}",
    )  # fmt: skip
    assert "made with tokenizer 000000000000; the checkpoint's model was trained with" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl"),
        ("a.jsonl", b'{"body": "one"}\n', "text"),
        ("a.txt", b"good \xff bad", "a.txt"),
        ("a.txt", b"", "a.txt"),
        ("a.pdf", b"%PDF", "a.pdf"),
    ],
)
def test_bad_text(
    name: str, content: bytes, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / name, tmp_path / "out"
    source.write_bytes(content)
    error = refusal(capfd, "prepare", str(source), f"--out={out}", "--tokenizer=bytes")
    assert error.startswith("error: ")
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_shipped_configurations_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    files = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.yaml")}
    assert files == {p.relative_to(REPOSITORY) for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert main(["configs"]) == 2
    assert "configs exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["configs", "a", "b"], "configs: unrecognized arguments: b"),
        (["checkpoint", "inspect"], "checkpoint inspect: the following arguments are required"),
        (["analyze", "noise", "m", "--seed", "-1"], "noise: argument --seed: it is -1; allowed"),
        (["generate", "--seed", str(2**64)], "it is 18446744073709551616; allowed: whole numbers"),
        (["probe", "now"], "probe: unrecognized arguments: now"),
    ],
)
def test_wrong_arguments_are_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
