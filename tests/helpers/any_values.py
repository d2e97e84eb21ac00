"""Values that nobody meant, for properties over settings and files."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ropepp.errors import user_message

# The same examples every day; more of them by HYPOTHESIS_PROFILE or a larger max_examples.
MANY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY = 1 << 30  # bytes that may be taken besides what the process has had

HUGE = st.sampled_from([2**31, 2**63, 2**70, -(2**63), 10**30, 1e308, float("inf"), float("nan")])
NUMBERS = st.one_of(st.integers(-3, 300), st.floats(-2, 2), HUGE)
WORDS = st.sampled_from(
    ["auto", "none", "RoPE", "YaRN", "os.system", "x.yaml", "..", "/", "${a}", "${oc.env:HOME}",
     "1e3", "~", "{", "[", "!!python/name:os.system", "", " ", "fsdp2", "bf16", "\ud800", "a\nb"]
)  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=6))
KEYS = st.one_of(
    WORDS, st.sampled_from(["class_path", "init_args", "name", "low", "high", "choices"])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)


@contextmanager
def accepted_or_refused() -> Iterator[None]:
    """What is raised within must be for the user: one line; and the memory is bounded."""
    before = _peak()
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        assert message.strip()
        assert "\n" not in message
    assert _peak() - before < MEMORY


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def changed(content: Any, draw: Any) -> Any:
    """A nested value of which one part is another, gone, or new."""
    if isinstance(content, dict) and content and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(content, key=str)))
        return {**content, key: changed(content[key], draw)}
    if isinstance(content, list) and content and draw(st.booleans()):
        at = draw(st.integers(0, len(content) - 1))
        return [*content[:at], changed(content[at], draw), *content[at + 1 :]]
    if isinstance(content, dict) and content:
        how = draw(st.sampled_from(["gone", "new", "other"]))
        if how == "gone":
            gone = draw(st.sampled_from(sorted(content, key=str)))
            return {key: value for key, value in content.items() if key != gone}
        if how == "new":
            return {**content, draw(KEYS): draw(VALUES)}
    return draw(VALUES)
