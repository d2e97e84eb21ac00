"""The 13 tasks of RULER (arXiv 2404.06654), at any length and with any tokenizer."""

from functools import partial
from pathlib import Path

from ropepp.eval.ruler.aggregation import CommonWords, FrequentWords
from ropepp.eval.ruler.background import ESSAYS, essay_words, given, speech_files
from ropepp.eval.ruler.base import words
from ropepp.eval.ruler.niah import Needles
from ropepp.eval.ruler.pools import (
    HOTPOT,
    SQUAD,
    read_hotpot,
    read_squad,
    speech_presidents,
    speech_years,
)
from ropepp.eval.ruler.qa import DocumentQuestions
from ropepp.eval.ruler.tracing import VariableTracking
from ropepp.eval.tasks import Task


def ruler_tasks(data: Path | None) -> list[Task]:
    """All tasks, in the paper's order.

    Args:
        data: A folder with the original's files, each optional: PaulGrahamEssays.json, squad.json,
            hotpotqa.json. Public speeches stand in for those that are missing, and the tasks
            that use them are not official.

    Raises:
        InputError: A given file has another form, or a package with words or speeches is missing.
    """
    words("noun")
    essay, squad, hotpot = (given(data, name) for name in (ESSAYS, SQUAD, HOTPOT))
    if essay is None or squad is None or hotpot is None:
        speech_files()
    for path, read in ((essay, essay_words), (squad, read_squad), (hotpot, read_hotpot)):
        if path is not None:
            read(path)  # and keeps it

    hidden = partial(Needles, haystack="essay", essay=essay, official=essay is not None)
    return [
        Needles("niah_single_1", "noise"),
        hidden("niah_single_2"),
        hidden("niah_single_3", value="uuids"),
        hidden("niah_multikey_1", keys=4),
        Needles("niah_multikey_2", "needles"),
        Needles("niah_multikey_3", "needles", key="uuids", value="uuids"),
        hidden("niah_multivalue", values=4),
        hidden("niah_multiquery", keys=4, queries=4),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        DocumentQuestions(
            "qa_1", partial(read_squad, squad) if squad else speech_years, bool(squad)
        ),
        DocumentQuestions(
            "qa_2", partial(read_hotpot, hotpot) if hotpot else speech_presidents, bool(hotpot)
        ),
    ]
