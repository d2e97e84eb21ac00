"""Folders of models by their names on the Hugging Face hub."""

import os
from pathlib import Path

from ropepp.errors import InputError, require_package

PREFIX = "hub:"
FILES = ("*.json", "*.safetensors", "tokenizer.model")  # never a pickle


def local_path(name: str | Path) -> Path:
    """Where a model is on this machine.

    Args:
        name: A path, which is returned; or ``hub:NAME[@REVISION]``, whose folder comes from
            huggingface_hub's cache, into which what is missing is downloaded first. Its own
            environment variables hold: ``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``,
            ``HF_HUB_OFFLINE``.

    Raises:
        InputError: huggingface_hub is missing, there is no such model or revision, or it can
            neither be fetched nor found in the cache.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    require_package("huggingface_hub", "hub", text)
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
    except errors.HFValidationError as error:
        raise InputError(f"model is {text!r}, no name of the hub: {_line(error)}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{text}: the model has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{text}: the hub has no such model, or shows it to accounts with access alone "
            "(HF_TOKEN, or `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{text}: the hub cannot be reached, and the model is not whole in the cache "
            f"({_line(error)}); fetch it where there is network, or give a folder"
        ) from error
    except Exception as error:  # below it are libraries of all kinds
        raise InputError(f"{text} cannot be fetched: {_line(error)}") from error
    return Path(found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
