"""Whatever a configuration says, it is accepted or refused in one line; nothing is trained."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.fit_runs import CONFIG
from ropepp import pipeline
from ropepp.errors import InputError, user_message
from ropepp.runs.settings import read_settings
from ropepp.sweep import config as sweeps
from ropepp.train.estimate import plan_run
from ropepp.train.lightning_cli import RopeppCLI

QUICK = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
MEMORY = 1 << 30  # bytes that a test may take besides what there was

NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**63, 2**70, -(2**63), 10**400]), st.floats()
)
TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["auto", "none", "RoPE", "os.system", "x.yaml", "..", "/", "${a}", "1e3", "~", "{"]),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(TEXT, st.sampled_from(["class_path", "init_args"])), inner, max_size=3),
    ),
    max_leaves=6,
)


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What is raised must be for the user, in one line and not too long to read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        assert message.strip()
        assert "\n" not in message
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY


def keys_of_fit() -> list[str]:
    """All keys with a value of their own, of the classes that a small run has."""
    flat: list[str] = []

    def walk(value: Any, at: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{at}.{key}" if at else str(key))
        else:
            flat.append(at)

    parser = RopeppCLI.__new__(RopeppCLI)  # its parser alone
    del parser
    walk(CONFIG, "")
    return [key.replace(".init_args", "") for key in flat]


FIT_KEYS = [
    *(f"model.network.{key}" for key in CONFIG["model.network"]),
    *("head_size", "norm_eps", "tied_embeddings", "qk_norm", "init_std", "o_proj.std.gain"),
]
"""Filled below, once the parser has been asked."""


def flags(values: dict[str, Any]) -> list[str]:
    return [
        f"--{key}={json.dumps(value) if isinstance(value, dict | list | bool | None) else value}"
        for key, value in values.items()
    ]
