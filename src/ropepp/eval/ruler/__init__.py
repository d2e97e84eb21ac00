"""The 13 tasks of RULER (arXiv 2404.06654), at any length and with any tokenizer."""

from functools import partial
from pathlib import Path

from ropepp.eval.ruler import pools
from ropepp.eval.ruler.aggregation import CommonWords, FrequentWords
from ropepp.eval.ruler.background import ESSAYS, essay_words, given, speech_files
from ropepp.eval.ruler.base import CURRENT, Edition, RulerTask, words
from ropepp.eval.ruler.niah import Needles
from ropepp.eval.ruler.qa import DocumentQuestions
from ropepp.eval.ruler.tracing import VariableTracking


def ruler_tasks(data: Path | None, edition: Edition = CURRENT) -> list[RulerTask]:
    """All tasks, in the paper's order. ``data`` is a folder with the original's files, each
    optional: PaulGrahamEssays.json, squad.json, hotpotqa.json. Public speeches stand in for those
    that are missing, and the tasks that use them are not official. An `InputError` if a given file
    has another form, or a package with words or speeches is missing."""
    words("noun")
    essay, squad, hotpot = (given(data, x) for x in (ESSAYS, pools.SQUAD, pools.HOTPOT))
    if essay is None or squad is None or hotpot is None:
        speech_files()
    readers = ((essay, essay_words), (squad, pools.read_squad), (hotpot, pools.read_hotpot))
    for path, read in readers:
        if path is not None:
            read(path)  # and keeps it

    needles = partial(Needles, edition=edition)
    hidden = partial(needles, haystack="essay", essay=essay, official=essay is not None)
    first = partial(pools.read_squad, squad) if squad else pools.speech_years
    second = partial(pools.read_hotpot, hotpot) if hotpot else pools.speech_presidents
    return [
        needles("niah_single_1", "noise"),
        hidden("niah_single_2"),
        hidden("niah_single_3", value="uuids"),
        hidden("niah_multikey_1", keys=4),
        needles("niah_multikey_2", "needles"),
        needles("niah_multikey_3", "needles", key="uuids", value="uuids"),
        hidden("niah_multivalue", values=4),
        hidden("niah_multiquery", keys=4, queries=4),
        VariableTracking(edition=edition),
        CommonWords(edition=edition),
        FrequentWords(edition.fwe_tokens, edition=edition),
        DocumentQuestions("qa_1", first, edition.qa_tokens, bool(squad), edition=edition),
        DocumentQuestions("qa_2", second, edition.qa_tokens, bool(hotpot), edition=edition),
    ]
