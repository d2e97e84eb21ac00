"""The trace of a few steps, and that it changes nothing."""

import json
from pathlib import Path

from helpers.fit_runs import curve, fit


def test_profile(corpus: Path, tmp_path: Path) -> None:
    changes = {"profile__steps": 2, "profile__first_step": 1, "trainer__max_steps": 4}
    run = fit(corpus, tmp_path, "profiled", **changes)
    (file,) = (run / "profile").iterdir()
    assert file.name == "rank-0.json"
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert curve(run) == curve(fit(corpus, tmp_path, "plain", trainer__max_steps=4))
