"""Folders of models by their names on the Hugging Face hub."""

import os
from pathlib import Path
from textwrap import shorten

from ropepp.errors import InputError, optional

PREFIX = "hub:"
FILES = ("*.json", "*.safetensors", "tokenizer.model")  # never a pickle


def local_path(name: str | Path) -> Path:
    """Where a model is on this machine: a path as it is; the folder of ``hub:NAME[@REVISION]`` in
    huggingface_hub's cache, into which what is missing is downloaded first. Its own environment
    variables hold: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``. An `InputError`
    if huggingface_hub is missing, there is no such model or revision, or it can neither be fetched
    nor found in the cache."""
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    optional("huggingface_hub", "hub", text)
    from huggingface_hub import errors, snapshot_download

    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    if not repository or (at and not revision):
        raise InputError(f"model is {text!r}; allowed is hub:NAME or hub:NAME@REVISION")
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[*FILES],
            endpoint=os.environ.get("HF_ENDPOINT"),  # the library has read it when imported
        )
    except Exception as error:  # below it are libraries of all kinds
        said = shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        reasons = {
            errors.HFValidationError: f"model is {text!r}, no name of the hub: {said}",
            errors.RevisionNotFoundError: f"{text}: the model has no revision {revision!r}",
            errors.RepositoryNotFoundError: f"{text}: the hub has no such model, or shows it to "
            "accounts with access alone (HF_TOKEN, or `hf auth login`)",
            errors.LocalEntryNotFoundError: f"{text}: the hub cannot be reached, and the model is "
            f"not whole in the cache ({said}); fetch it where there is network, or give a folder",
            Exception: f"{text} cannot be fetched: {said}",
        }
        why = next(why for kind, why in reasons.items() if isinstance(error, kind))
        raise InputError(why) from error
    return Path(found)
