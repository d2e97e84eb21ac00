"""What the tasks of RULER share: scoring, words."""

import re
from functools import cache

from ropepp.errors import InputError
from ropepp.eval.tasks import Sample, Task

_CONTROL = re.compile(r"[\x00-\x1f]")


class RulerTask(Task):
    """Scores by the share of the expected strings that the output holds, case ignored; with
    `any_answer`, 1 if it holds one of them."""

    suite = "ruler"
    official = True
    baseline = 0.0
    any_answer = False

    def score(self, output: str, sample: Sample) -> dict[str, float]:
        text = _CONTROL.sub("\n", output).strip().lower()
        hits = [answer.lower() in text for answer in sample.answers]
        return {"score": float(any(hits)) if self.any_answer else sum(hits) / len(hits)}


@cache
def words(category: str) -> tuple[str, ...]:
    """The words of a category of wonderwords ("noun", "adjective" or "verb"), sorted.

    Raises:
        InputError: wonderwords is missing.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise InputError(
            "RULER takes its words from wonderwords, which is missing: pip install 'ropepp[eval]'"
        ) from error
    return tuple(sorted(set(RandomWord().filter(include_categories=[category]))))
