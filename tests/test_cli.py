"""The command: help, start-up cost, and errors that a user can mend."""

import subprocess
import sys
from pathlib import Path

import pytest

from fit_runs import arguments
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
        ({"model__position": "RoPE3"}, "RoPE3"),
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
        ({"data__sequence_length": 10**6}, "1000000"),
        ({"data__micro_batch_size": 3}, "global_batch_size is 8"),
        ({"data__corpus": "no/such/folder"}, "no/such/folder"),
        ({"model__network": {**SIZES, "vocab_size": 100, "num_heads": 2, "num_kv_heads": 2}},
         "vocab_size is 100"),
        ({"checkpoint__every_n_steps": -1}, "every_n_steps is -1"),
        ({"ckpt_path": "no/such/file.ckpt"}, "no/such/file.ckpt"),
        ({"ckpt_path": "last"}, "holds no checkpoint"),
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
