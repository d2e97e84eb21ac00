"""Reports of made-up sweeps: what they claim, what they warn of, and that the files stand alone."""

import base64
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.sweep_files import LENGTH, STEPS, TOKENS_PER_STEP, result, write_run, write_sweep
from helpers.sweep_files import report_rows as rows
from helpers.sweep_files import report_table as table
from ropepp.errors import InputError
from ropepp.runs.records import read_runs
from ropepp.sweep import plots
from ropepp.sweep.report import write_report

MINUS = "\N{MINUS SIGN}"
BASE = {0: 5.80, 1: 5.85, 2: 5.75, 3: 5.82, 4: 5.79}


def shifted(shift: float, *noise: float) -> dict[int, float]:
    """The baseline's losses, moved and disturbed."""
    return {seed: BASE[seed] + shift + own for seed, own in enumerate(noise)}


LOSSES = {
    "rope": BASE,
    "ec": shifted(-0.05, 0.004, -0.003, 0.002, -0.001, 0.0),
    "eh": shifted(0.0, 0.02, -0.03, 0.01, 0.015, -0.02),
    "alibi": dict(BASE),
}


def report(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.md").read_text()


def test_files_and_verdicts(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    files = write_report(folder)
    assert [file.name for file in files] == ["report.md", "report.html", "report.csv"]
    assert not list(folder.glob("*.tmp"))
    text = files[0].read_text()
    for part in (
        "# Sweep heads",
        "Does the imaginary half help?",
        "Baseline: RoPE. Metric: validation loss (nats per token).",
        "d4074fe452",
        "AMD EPYC, 2 threads",
        "2026-11-24 13:40 to 2026-11-24 13:44 UTC",
        f"`ropepp sweep report {folder}`",
    ):
        assert part in text
    found = rows(text, "Results")
    assert list(found) == ["RoPE", "RoPE++ EC", "RoPE++ EH", "ALiBi"]
    assert [row["verdict"] for row in found.values()] == [
        "baseline", "lower, real at 5%", "no difference shown", "identical",
    ]  # fmt: skip
    # The sd of the differences is 0.0027: two digits of it are four behind the point.
    assert found["RoPE++ EC"]["difference [95%]"].startswith(f"{MINUS}0.0496 [{MINUS}0.0530, ")
    assert found["RoPE++ EH"]["difference [95%]"].startswith(f"{MINUS}0.001 [")
    assert found["ALiBi"]["difference [95%]"] == "0"
    assert found["RoPE"]["mean"] == "5.802"
    assert "Not an equal comparison" not in text


def test_csv_has_the_inputs(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    write_report(folder)
    found = table(folder)
    assert list(found) == list(LOSSES)
    for variant, own in LOSSES.items():
        row, expected = found[variant], result(variant, 0, 0.0)
        assert int(row["seeds"]) == 5
        assert float(row["mean"]) == pytest.approx(statistics.fmean(own.values()), rel=1e-12)
        assert float(row["sd"]) == pytest.approx(statistics.stdev(own.values()), rel=1e-12)
        for key in ("parameters", "kv_cache_bytes_per_token", "training_flops_per_token"):
            assert float(row[key]) == expected[key]
        assert float(row["tokens_per_second"]) == 4726.0  # of seed 2, the median
        assert float(row["peak_memory_bytes"]) == 1_400_000_004
    differences = [LOSSES["eh"][seed] - BASE[seed] for seed in BASE]
    assert float(found["eh"]["difference"]) == pytest.approx(statistics.fmean(differences))
    assert float(found["eh"]["sd_of_differences"]) == pytest.approx(statistics.stdev(differences))
    assert float(found["eh"]["low_95"]) < 0 < float(found["eh"]["high_95"])
    assert float(found["eh"]["low_simultaneous"]) < float(found["eh"]["low_95"])
    assert (found["rope"]["difference"], found["rope"]["p"]) == ("", "")
    assert (found["alibi"]["verdict"], float(found["alibi"]["p_holm"])) == ("identical", 1)


def test_each_is_compared_with_the_baseline_of_its_own_values(tmp_path: Path) -> None:
    """Deep models among each other: what depth does is no part of a variant's difference."""
    losses = {
        **LOSSES,
        "rope-deep": shifted(-0.5, *[0.0] * 5),
        "ec-deep": shifted(-0.46, *[0.0] * 5),
    }
    losses["ec-deep"][0] += 0.005
    plan = {"display": {"rope-deep": "RoPE, deep", "ec-deep": "EC, deep"}}
    folder = write_sweep(tmp_path / "a", losses, baselines={"ec-deep": "rope-deep"}, **plan)
    text = report(folder)
    assert "Baseline: rope, or its row of the same values of the axes." in text
    found = rows(text, "Results")
    assert found["rope"]["compared to"] == ""
    assert found["ec"]["compared to"] == found["RoPE, deep"]["compared to"] == "rope"
    assert found["EC, deep"]["compared to"] == "RoPE, deep"
    numbers = table(folder)
    assert numbers["ec-deep"]["baseline"] == "rope-deep"
    assert float(numbers["ec-deep"]["difference"]) == pytest.approx(0.041)
    assert float(numbers["rope-deep"]["difference"]) == pytest.approx(-0.5)
    # As if each had been a sweep of its own, but for what is corrected.
    alone = {"rope": losses["rope-deep"], "ec": losses["ec-deep"]}
    write_report(write_sweep(tmp_path / "b", alone))
    for key in ("difference", "low_95", "high_95", "p", "p_sign_flip"):
        assert numbers["ec-deep"][key] == table(tmp_path / "b")["ec"][key]
    html = (folder / "report.html").read_bytes()
    assert b"minus baseline" in base64.b64decode(re.findall(rb"base64,([^\"]+)", html)[2])
    assert "Without any run" not in text

    left = {name: own for name, own in losses.items() if name != "rope-deep"}
    text = report(write_sweep(tmp_path / "c", left, baselines={"ec-deep": "rope-deep"}, **plan))
    assert "The baseline RoPE, deep has no result: no comparison." in text
    assert rows(text, "Results")["EC, deep"]["verdict"] == "no pairs"


def test_costs_are_compared_with_the_baseline(tmp_path: Path) -> None:
    changes = {
        ("ec", seed): {"parameters": 8_184_000, "training_flops_per_token": 3.534e7}
        for seed in BASE
    }
    folder = write_sweep(tmp_path / "heads", LOSSES, changes=changes)
    text = report(folder)
    found = rows(text, "Costs")["RoPE++ EC"]
    assert (found["parameters"], found["parameters to baseline"]) == ("8,184,000", "+10.0%")
    assert (found["training GFLOP/token"], found["FLOPs to baseline"]) == (
        "0.03534", f"{MINUS}5.0%",
    )  # fmt: skip
    assert rows(text, "Costs")["RoPE"]["FLOPs to baseline"] == ""
    assert rows(text, "Costs")["RoPE++ EH"]["KV-cache bytes/token"] == "1,024"
    assert "may have done other work" in text


def test_one_seed_is_a_smoke_test(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", {"rope": {0: 5.8}, "ec": {0: 5.7}})
    text = report(folder)
    row = rows(text, "Results")["RoPE++ EC"]
    assert "too few seeds" in row["verdict"]
    assert row["difference [95%]"] == f"{MINUS}0.1000"
    assert "RoPE++ EC: one seed is a smoke test" in text
    assert "real at 5% |" not in text


def test_two_seeds_claim_nothing(tmp_path: Path) -> None:
    losses = {"rope": {0: 5.8, 1: 5.9}, "ec": {0: 5.7, 1: 5.8001}}
    text = report(write_sweep(tmp_path / "heads", losses))
    assert rows(text, "Results")["RoPE++ EC"]["verdict"] == "too few seeds"
    assert "one degree of freedom; such an interval is hardly informative" in text
    assert "fewer than 5 pairs have little power" in text
    assert "fewer than 6 pairs cannot reach p < 0.05" in text


def test_six_seeds_get_a_sign_flip_p(tmp_path: Path) -> None:
    base = {seed: 5.8 + 0.01 * seed for seed in range(6)}
    losses = {"rope": base, "ec": {seed: x - 0.05 - 0.001 * seed for seed, x in base.items()}}
    text = report(write_sweep(tmp_path / "heads", losses))
    assert rows(text, "How much the seeds can show")["RoPE++ EC"]["sign-flip p"] == "0.031"
    assert "cannot reach" not in text
    assert "little power" not in text


def test_partial_sweep(tmp_path: Path) -> None:
    losses = {"rope": BASE, "ec": {0: 5.7, 1: 5.76, 9: 5.7}}
    folder = write_sweep(
        tmp_path / "heads",
        losses,
        unfinished=[("ec", 2), ("fope", 0)],
        variants=["rope", "ec", "fope", "eh"],
    )
    text = report(folder)
    assert "Not finished, or failed, and left out: ec/seed-2, fope/seed-0." in text
    assert "Without any run: eh." in text
    assert (
        "RoPE++ EC has 2 pairs with the baseline: RoPE++ EC alone has seed 9; "
        "the baseline alone has seed 2, 3, 4." in text
    )
    assert rows(text, "Results")["FoPE"]["verdict"] == "no result"
    found = table(folder)
    assert (found["ec"]["seeds"], found["ec"]["pairs"]) == ("3", "2")
    assert (found["fope"]["seeds"], found["fope"]["mean"], found["fope"]["p"]) == ("0", "", "")


def test_baseline_may_be_unfinished(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", {"ec": BASE}, unfinished=[("rope", 0)])
    text = report(folder)
    assert "The baseline RoPE has no result: no comparison." in text
    assert rows(text, "Results")["RoPE++ EC"]["verdict"] == "no pairs"


def test_one_variant(tmp_path: Path) -> None:
    text = report(write_sweep(tmp_path / "heads", {"rope": {0: 5.8}}))
    assert "One variant with one seed: a smoke test." in text
    assert "learning rate" not in text


@pytest.mark.parametrize("lost", [math.nan, math.inf, None])  # null: never logged
def test_diverged_runs_are_named(tmp_path: Path, lost: Any) -> None:
    changes = {("ec", 1): {"validation_loss": lost}}
    text = report(write_sweep(tmp_path / "heads", LOSSES, changes=changes))
    diverged = "Diverged (no finite value), and left out, which flatters their variants: ec/seed-1."
    unmeasured = "Without a value of validation_loss, which was never logged: ec/seed-1."
    assert (diverged in text, unmeasured in text) == (lost is not None, lost is None)
    assert rows(text, "Results")["RoPE++ EC"]["seeds"] == "4"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 299),
        ("tokens", 12),
        ("sequence_length", 512),
        ("commit", "abc+"),
        ("device", "NVIDIA H100"),
        ("torch", "2.12.0"),
        ("world_size", 2),
    ],
)
def test_unequal_runs_are_said_to_be(tmp_path: Path, key: str, value: Any) -> None:
    text = report(write_sweep(tmp_path / "heads", LOSSES, changes={("eh", 3): {key: value}}))
    line = next(line for line in text.splitlines() if "Not an equal comparison" in line)
    assert key.replace("_", " ") in line
    assert line.endswith(f"in 19 runs; {value} in eh/seed-3.")
    assert ("uncommitted" in text) == (key == "commit")


def test_skipped_steps_are_named(tmp_path: Path) -> None:
    changes = {("ec", 1): {"skipped_steps": 3}, ("ec", 0): {"skipped_steps": 0}}
    text = report(write_sweep(tmp_path / "heads", LOSSES, changes=changes))
    assert "Skipped steps, which changed no weight: ec/seed-1 3." in text


def test_shared_learning_rate_is_named(tmp_path: Path) -> None:
    assert "share one learning rate" in report(write_sweep(tmp_path / "a", LOSSES))
    own = write_sweep(tmp_path / "b", LOSSES, shared_learning_rate=False)
    assert "share one learning rate" not in report(own)


def test_html_stands_alone(tmp_path: Path) -> None:
    question = "Is a < b & <script>c</script>? [d](javascript:e) ![f](//g/h.png) **i** j|k"
    folder = write_sweep(tmp_path / "heads", LOSSES, question=question)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "Is a &lt; b &amp; &lt;script&gt;" in page
    assert "[d](javascript:e) ![f](//g/h.png) **i** j|k" in page  # as text
    assert not any(tag in page for tag in ("<script", "href=", "<strong>i"))
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(images) == page.count("<img") == 4  # all runs, differences, two losses
    for text in [re.sub('base64,[^"]*', "", page), *(_decoded(image) for image in images)]:
        names = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', "", text,
                       flags=re.DOTALL)  # fmt: skip
        assert "http" not in names
        assert not re.search(r"url\((?!#)", names)
    assert '<meta name="viewport" content="width=device-width' in page
    assert "&lt;script>" in (folder / "report.md").read_text()


def _decoded(image: str) -> str:
    return base64.b64decode(image).decode()


def test_reports_repeat(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    first = [file.read_bytes() for file in write_report(folder)]
    assert [file.read_bytes() for file in write_report(folder)] == first


def test_a_variant_keeps_its_colour(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    write_report(folder)
    page = (folder / "report.html").read_text()
    for name, color in (("RoPE", plots.BASELINE), ("RoPE++ EC", plots.PALETTE[0])):
        assert page.count(f'<i style="background:{color}"></i>{name}</td>') >= 2
    svgs = [_decoded(image) for image in re.findall(r'base64,([^"]*)"', page)]
    assert all(plots.PALETTE[0].lower() in svg for svg in svgs)
    assert all(plots.BASELINE in svg for svg in svgs)


def test_curves_are_on_tokens(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", {"rope": {0: 5.8}})
    runs = read_runs(folder)
    x, y = plots.training_curves(runs, "validation/loss")["rope"][0]
    assert list(x) == [50 * TOKENS_PER_STEP * k for k in range(1, 7)]
    lines = [line for line in runs[0].metrics() if "validation/loss" in line]
    assert list(y) == [line["validation/loss"] for line in lines]
    raw = [line["train/loss"] for line in runs[0].metrics() if "train/loss" in line]
    x, y = plots.training_curves(runs, "train/loss", 5)["rope"][0]
    assert (len(x), x[0]) == (STEPS // 10 - 4, pytest.approx(30 * TOKENS_PER_STEP))
    assert y[0] == pytest.approx(np.mean(raw[:5]))


def test_loss_by_position_of_the_shortest_and_longest_rows(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "": {"position": [0, 1, 2.5], "loss": [6.0, 5.5, 5.0], "count": [1, 1, 2]},
        "_2x": {"position": [0], "loss": [6.0], "count": [1]},
        "_4x": {"position": [0, 1, 2.5], "loss": [6.0, None, 4.0], "count": [1, 1, 2]},
    }
    changes = {("rope", 0): {"loss_by_position": content}}
    folder = write_sweep(tmp_path / "heads", {"rope": {0: 5.8}}, changes=changes)
    curves = plots.position_curves(read_runs(folder))
    assert list(curves) == ["", "_4x"]
    x, y = curves[""]["rope"][0]
    assert (list(x), list(y)) == ([1, 2, 3.5], [6.0, 5.5, 5.0])
    x, y = curves["_4x"]["rope"][0]
    assert (list(x), list(y)) == ([1, 3.5], [6.0, 4.0])
    assert "Loss by position in rows of 4 times the trained length" in report(folder)


def test_lengths_of_evaluation_sets(tmp_path: Path) -> None:
    suffixes = ("", "_2x", "_test", "_128", "_x", "_")
    lengths = [plots.set_length(suffix, 64) for suffix in suffixes]
    assert lengths == [64, 128, None, None, None, None]
    evaluation = {
        "validation/loss": 5.0, "validation_2x/loss": 6.0, "validation_8x/loss": 7.0,
        "validation/accuracy": 0.9, "validation_2x/accuracy": 0.5, "validation_8x/accuracy": 0.25,
        "validation/perplexity": 148.0,
    }  # fmt: skip
    changes = {("rope", 0): {"evaluation": evaluation}}
    folder = write_sweep(tmp_path / "heads", {"rope": {0: 5.0}, "ec": {0: 4.9}}, changes=changes)
    curves = plots.length_curves(read_runs(folder), "accuracy")
    assert list(curves) == ["rope"]  # the other has one length, which is no curve
    x, y = curves["rope"][0]
    assert (list(x), list(y)) == ([LENGTH, 2 * LENGTH, 8 * LENGTH], [0.9, 0.5, 0.25])
    text = report(folder)
    assert "Loss by length" in text
    assert "Accuracy by length" in text


def test_metric_may_be_an_evaluation_sets(tmp_path: Path) -> None:
    changes = {
        (variant, seed): {"evaluation": {"validation/loss": 5.0, "validation_8x/loss": loss + 1}}
        for variant, own in LOSSES.items() for seed, loss in own.items()
    }  # fmt: skip
    folder = write_sweep(tmp_path / "heads", LOSSES, changes=changes, metric="validation_8x/loss")
    assert rows(report(folder), "Results")["RoPE"]["mean"] == "6.802"


def test_many_variants_are_drawn(tmp_path: Path) -> None:
    losses = {"rope": BASE} | {f"phases {i}": shifted(0.01 * i, 0.0, 0.01) for i in range(14)}
    folder = write_sweep(tmp_path / "heads", losses)
    looks = plots.styles(_sweep(folder))
    assert len({(look.color, look.line) for look in looks.values()}) == len(losses)
    write_report(folder)


def _sweep(folder: Path) -> Any:
    from ropepp.sweep.results import load

    return load(folder)


def test_controls_are_shown_where_a_plan_has_them(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    plan = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**plan, "controls": ["eh"]}))
    assert f"Controls, equal to the baseline by construction: RoPE++ EH {MINUS}0.001" in report(
        folder
    )


def test_refuses_what_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no sweep's folder: sweep.json is missing"):
        write_report(tmp_path)
    folder = write_sweep(tmp_path / "heads", {}, unfinished=[("rope", 0)])
    with pytest.raises(InputError, match=r"no finished run of its YAML; `ropepp sweep run` ma"):
        write_report(folder)
    write_run(folder, "rope", 0, result("rope", 0, 5.0))
    write_sweep(folder, {"rope": {0: 5.0}}, metric="bleu")
    with pytest.raises(InputError, match=r"'bleu', which rope/seed-0 has not; it has .*_loss"):
        write_report(folder)


@pytest.mark.parametrize("name", ["scipy.stats", "matplotlib"])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = write_sweep(tmp_path / "heads", LOSSES)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'ropepp\[sweep\]'"):
        write_report(folder)


def test_import_is_light() -> None:
    heavy = ("torch", "lightning", "scipy", "matplotlib")
    code = f"import sys, ropepp.sweep.report; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
