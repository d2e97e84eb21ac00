"""transformers without network, and with a place of its own for the code of folders."""

import os
import tempfile

import pytest

os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="ropepp-hf-"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here alone: other tests have a hub of their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
