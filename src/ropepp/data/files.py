"""Folders that appear complete or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ropepp.errors import InputError


@contextmanager
def replacing_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new hidden folder beside `target` that takes its name when the block ends well.

    When the block raises, the hidden folder is removed and `target` is as it was before.

    Args:
        target: The folder's final name; missing parents are made.
        overwrite: Replace a folder that has this name already; it is removed only once the new one
            is in place.

    Raises:
        InputError: `target` exists and `overwrite` is false.
    """
    final = target.resolve()
    require_free(final, overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        yield work
        require_free(final, overwrite)
        _rename_over(work, final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def require_free(target: Path, overwrite: bool) -> None:
    """Refuses to take a name that is in use.

    Raises:
        InputError: `target` exists and `overwrite` is false.
    """
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists; choose another name or pass --overwrite true")


def _rename_over(work: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
    _sync_folder(final.parent)
    if replaces:
        shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
