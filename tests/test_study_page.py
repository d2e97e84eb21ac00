"""Pages of studies: statistics by other means, and words that stay."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import study_page
from ropepp.errors import InputError
from studies import LOSSES, finish, search, write
from study import Study
from study_page import Contrast, Results, comparisons, paired, verdict


@pytest.fixture
def toy(tmp_path: Path) -> Study:
    return write(tmp_path)


DIFFERENCES = [0.013, -0.02, 0.055, 0.031, 0.018, 0.042, 0.001, 0.027]


def test_statistics_by_scipy(toy: Study) -> None:
    for seed, difference in enumerate(DIFFERENCES):
        for part, row, value in (("final", "rope_best", 4.0), ("final", "ec_best", 4 + difference)):
            finish(toy, part, row, seed, value + 0.1 * seed)
    toy.collect("final")
    results = Results(toy)
    found = paired(results.losses("final", "ec", "best"), results.losses("final", "rope", "best"))
    assert found == pytest.approx(DIFFERENCES)
    sides = ("final", "ec", "best"), ("final", "rope", "best")
    table = comparisons(results, [Contrast("it", *sides)])
    test = scipy.stats.ttest_1samp(DIFFERENCES, 0.0)
    low, high = test.confidence_interval(0.95)
    assert f"| 8 | {np.mean(DIFFERENCES):+.3f} | {low:+.3f} to {high:+.3f} |" in table
    assert f"| {test.pvalue:.2g} |" in table
    flips = scipy.stats.permutation_test(
        (DIFFERENCES,), np.sum, permutation_type="samples", n_resamples=math.inf
    )
    assert f"| {flips.pvalue:.2g} |" in table


def test_differences_that_are_all_equal() -> None:
    assert study_page.t_test_p([0.0] * 4) == 1
    assert study_page.t_test_p([0.5] * 4) == 0
    assert verdict(1.0, 0.0, 0.0, 4) == "not seen"
    assert verdict(0.0, 0.5, 0.0, 4) == "shown: higher"


@pytest.mark.parametrize(
    ("p", "mean", "sd", "words"),
    [
        (0.001, -0.05, 0.02, "shown: lower"),
        (0.001, 0.05, 0.02, "shown: higher"),
        (0.5, 0.001, 0.01, "not seen"),
        (0.5, 0.001, 0.05, "undecided"),
        (0.06, 0.05, 0.02, "undecided"),
    ],
)
def test_words(p: float, mean: float, sd: float, words: str) -> None:
    assert verdict(p, mean, sd, 12) == words


def test_a_page_keeps_the_words_around_its_tables(
    toy: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(toy, LOSSES)
    page = toy.store.parent.with_suffix(".md")
    page.write_text("before\n\n<!-- make one -->\nold\n<!-- end -->\nafter\n")
    module = type("Blocks", (), {"BLOCKS": {"one": lambda results: "new\n"}, "PRIMARY": []})
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    study_page.write_page(toy)
    wanted = "before\n\n<!-- make one -->\nnew\n<!-- end -->\nafter\n"
    assert page.read_text() == wanted
    study_page.write_page(toy)
    assert page.read_text() == wanted
    for damaged in (
        "<!-- make one -->\nold\nwords\n<!-- make one -->\nold\n<!-- end -->\n",  # an end is gone
        "<!--make one -->\nold\n<!-- end -->\n",
        "<!-- make other -->\nold\n<!-- end -->\n",
        "no marks\n",
    ):
        page.write_text(damaged)
        with pytest.raises(InputError, match=r"toy.md: marks do not fit scripts/study_toy.py \("):
            study_page.write_page(toy)
        assert page.read_text() == damaged
    assert len(toy.store.with_suffix(".csv").read_text().splitlines()) == 1 + len(LOSSES)


def test_few_pairs_decide_nothing_where_signs_do() -> None:
    flips = study_page.Quantity(by_flips=True)
    assert study_page.p_value([0.5, 0.51, 0.49, 0.5, 0.52], flips) == 1
    assert study_page.p_value([0.5, 0.51, 0.49, 0.5, 0.52, 0.5], flips) == 2 / 64
    assert study_page.p_value([0.5, 0.51, 0.49], study_page.LOSS) < 0.01


def test_the_table_of_runs_has_what_primary_comparisons_are_about(toy: Study) -> None:
    search(toy, {"rope_std-1_lr-0.001": 5.0, "ec_std-1_lr-0.001": 4.0})
    far = study_page.Quantity(("measures", "far"), less=("measures", "near"))
    toy.records["search", "rope_std-1_lr-0.001", 100]["measures"] = {"far": 0.5, "near": 0.75}
    row = ("search", "rope", "std-1_lr-0.001")
    lines = study_page.runs_csv(toy, [Contrast("it", row, row, far)]).splitlines()
    assert lines[0].endswith(",measures/far,measures/near")
    assert sorted(line.split(",")[-2:] for line in lines[1:]) == [["", ""], ["0.5", "0.75"]]
