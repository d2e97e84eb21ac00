"""How close an answer is to the expected one, by the rules of SQuAD (arXiv 1606.05250).

lm-eval takes them for ReCoRD from a module that newer versions of transformers lack.
"""

import importlib
import re
import string
import sys
from collections import Counter
from types import ModuleType

MODULE = "transformers.data.metrics.squad_metrics"


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def compute_exact(expected: str, found: str) -> int:
    """1 if the words are the same in the same order, else 0."""
    return int(words_of(expected) == words_of(found))


def compute_f1(expected: str, found: str) -> float:
    """Harmonic mean of precision and recall of the words; of none, whether both have none."""
    gold, words = words_of(expected), words_of(found)
    if not gold or not words:
        return float(gold == words)
    return 2 * sum((Counter(gold) & Counter(words)).values()) / (len(gold) + len(words))


def provide() -> None:
    """Lets ``import transformers.data.metrics.squad_metrics`` find these rules if it is missing."""
    try:
        importlib.import_module(MODULE)
        return
    except ModuleNotFoundError:
        pass
    import transformers.data

    metrics, module = ModuleType(MODULE.rpartition(".")[0]), ModuleType(MODULE)
    vars(module).update(compute_exact=compute_exact, compute_f1=compute_f1)
    vars(metrics)["squad_metrics"] = module
    vars(transformers.data)["metrics"] = metrics
    sys.modules |= {metrics.__name__: metrics, MODULE: module}
