"""A position encoding in the user's own file: named by --trust, it works everywhere; a checkpoint
alone imports nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.fit_runs import CONFIG, arguments, curve
from ropepp.cli import main
from ropepp.options import TRUST

OWN = """
from dataclasses import dataclass
from pathlib import Path

from ropepp.model.heads import HeadLayout
from ropepp.model.positions.rotary import RoPE

Path(__file__).with_name("imported").touch()


@dataclass(frozen=True)
class Quarter(RoPE):
    angle: float = -45.0

    def layout(self, num_heads: int, num_kv_heads: int) -> HeadLayout:
        return HeadLayout.from_phases([(0.0, self.angle)] * num_heads, num_kv_heads)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the module; what the command line changes is put back."""
    (tmp_path / "own_turn.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TRUST, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_turn", None)


def trusting(*args: str) -> int:
    return main(["--trust", "own_turn", *args])


@pytest.mark.slow
def test_own_class_through_the_commands(corpus: Path, folder: Path) -> None:
    own: dict[str, Any] = {
        "model__position": {"class_path": "own_turn.Quarter", "init_args": {"angle": -30.0}}
    }
    own |= {"trainer__max_steps": 6, "checkpoint__every_n_steps": 3}
    whole, short = (arguments(corpus, folder / "logs", name, **own) for name in ("whole", "short"))
    assert trusting(*whole) == 0
    assert trusting(*short) == 0
    logs = folder / "logs" / "default"
    (logs / "short" / "result.json").unlink()
    max((logs / "short" / "checkpoints").iterdir()).unlink()
    assert trusting(*short, "--resume=auto") == 0
    assert curve(logs / "short") == curve(logs / "whole")
    result = json.loads((logs / "whole" / "result.json").read_text())
    assert result["variant"] == "Quarter"
    text = folder / "text.txt"
    text.write_text("stone and water " * 20)
    perplexity = ("--suite", "perplexity", "--text", str(text), "--lengths", "16")
    assert trusting("evaluate", str(logs / "whole"), *perplexity) == 0
    assert trusting("export", str(logs / "whole"), "out", "--format", "hf") == 0
    assert trusting("generate", "--ckpt", "out", "--prompt", "a", "--max_new_tokens", "2",
                    "--tokenizer", "bytes") == 0  # fmt: skip


@pytest.mark.slow
@pytest.mark.extra
def test_own_class_in_a_sweep(corpus: Path, folder: Path) -> None:
    base = {k: v for k, v in CONFIG.items() if k not in ("model.position", "trainer.max_steps")}
    (folder / "base.yaml").write_text(yaml.safe_dump({}))
    sweep = {
        "base": ["base.yaml"],
        "name": "own",
        "question": "Does a class of the user's own run?",
        "set": base | {"data.corpus": str(corpus), "trainer.max_steps": 2},
        "variants": {
            "rope": {"model.position": "RoPE"},
            "own": {"model.position": {"class_path": "own_turn.Quarter"}},
        },
        "seeds": [0],
        "baseline": "rope",
        "logs": str(folder / "logs"),
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(sweep))
    assert trusting("sweep", "run", "own.yaml") == 0
    (result,) = (folder / "logs" / "own").glob("own*/**/result.json")
    assert json.loads(result.read_text())["variant"] == "Quarter"


def test_without_trust_nothing_is_imported(
    corpus: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = CONFIG["model.network"]
    settings = {"model_type": "ropepp", "network": network}
    plain = {"class_path": "own_turn.Quarter", "init_args": {}}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(settings | {"position": plain}))
    monkeypatch.syspath_prepend(folder)
    assert main(["generate", "--ckpt", "model", "--prompt", "a"]) == 2
    assert "--trust own_turn" in capsys.readouterr().err
    assert not (folder / "imported").exists()
    # A configuration is the user's own word, but a checkpoint could not be read again.
    args = arguments(corpus, folder / "logs", "a", model__position="own_turn.Quarter")
    assert main(args) == 2
    assert "--trust own_turn" in capsys.readouterr().err


def test_a_module_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trust", "own_trun", "results"]) == 2
    assert "--trust is 'own_trun'; there is no module own_trun" in capsys.readouterr().err
