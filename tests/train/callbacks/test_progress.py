"""The progress bar: on standard error, over the steps of the whole run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.fit_runs import fit
from ropepp.train.callbacks import progress


def test_one_line_of_progress(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(corpus, tmp_path, "short", trainer__max_steps=3, data__validate_every_n_steps=2)
    out, err = capsys.readouterr()
    assert "step/s" not in out
    last = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("short:")][-1]
    assert "3/3 [" in last
    assert all(name in last for name in ("loss=", "val=", "tok/s="))

    fit(corpus, tmp_path, "short", trainer__max_steps=4, resume="auto")
    err = capsys.readouterr().err.replace("\r", "\n")
    first, *_, last = [line for line in err.splitlines() if line.startswith("short:")]
    assert "3/4 [" in first
    assert "4/4 [" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_validations_on_a_terminal(
    terminal: bool,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: terminal))
    )
    fit(corpus, tmp_path, "short", trainer__max_steps=2, data__validate_every_n_steps=1)
    assert ("validate:" in capsys.readouterr().err) is terminal
