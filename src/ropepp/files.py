"""Files and folders that are complete or absent; needs Python's standard library alone."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ropepp.errors import InputError


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON, completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that the file is complete or absent; missing
    parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # A name of a file may be no Unicode text.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


@contextmanager
def one_at_a_time(file: Path, what: str) -> Iterator[None]:
    """Refuses to do what another process does already.

    Args:
        file: The lock, which stays; made if it is not there.
        what: What is being done, for the message.

    Raises:
        InputError: Another process has it, or it cannot be written.
    """
    with disk_errors(file):
        handle = file.open("ab")
    with handle:
        _lock(handle.fileno(), what)
        yield


def _lock(handle: int, what: str) -> None:
    """Lets nobody else have an open file or folder; the system lets go when a process ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{what} is being written by another process") from error
    except OSError as error:  # some file systems have no locks
        reason = error.strerror or error
        print(f"{what}: no lock ({reason}); let no other process write it", file=sys.stderr)


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


@contextmanager
def replacing_file(target: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes its name when the block ends well, and is removed otherwise.

    Args:
        target: The file's final name; missing parents are made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        with work.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        work.rename(target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def require_writable(target: Path, folder: bool = False) -> None:
    """Tries whether a file, or a folder, can be written under this name, before the work whose
    result it is to hold; leaves nothing behind.

    Raises:
        InputError: It cannot.
    """
    with disk_errors(target):
        if target.exists() and target.is_dir() != folder:
            is_one = "a folder" if target.is_dir() else "a file"
            raise FileExistsError(errno.EEXIST, f"{is_one} has this name")
        if target.is_file():
            target.open("ab").close()
        trial = target / ".trial" if target.is_dir() else target
        trial = trial.with_name(f".{trial.name}.partial-{secrets.token_hex(4)}")
        missing = [parent for parent in trial.parents if not parent.exists()]
        try:
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()
        finally:
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def printable(name: str | Path) -> str:
    """A file's name as text: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


class DiskError(InputError):
    """A file could not be written, as on a full disk: trying the next one is of no use."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Names the file that could not be written.

    Raises:
        DiskError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DiskError(f"{path} cannot be written: {reason}{advice}") from error


@contextmanager
def resuming_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a hidden folder beside `target` that takes its name when the block ends well.

    The hidden folder's name depends on the target's alone: what a killed process left there is
    found again. When the block raises, an empty folder is removed, and the rest stays.

    Args:
        target: The folder's final name; missing parents are made.
        overwrite: Replace a folder that has this name already; it is removed only once the new one
            is in place.

    Raises:
        InputError: `target` exists and `overwrite` is false, or another process works on it.
    """
    final = target.resolve()
    require_free(final, overwrite)
    work = final.with_name(f".{final.name}.partial")
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with _opened(work) as handle:
        _lock(handle, str(target))
        try:
            yield work
            require_free(final, overwrite)
            _rename_over(work, final)
        finally:
            if work.is_dir() and not any(work.iterdir()):
                work.rmdir()


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it.

    Raises:
        DiskError: It cannot be written.
    """
    with disk_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free(target: Path, overwrite: bool | None = None) -> None:
    """Refuses to take a name that is in use.

    Raises:
        InputError: `target` exists and `overwrite` is false, or None where there is no such option.
    """
    with disk_errors(target):
        exists = target.exists()
    if exists and not overwrite:
        advice = "" if overwrite is None else " or pass --overwrite true"
        raise InputError(f"{target} exists; choose another name{advice}")


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
    sync_folder(final.parent)
    if replaces:
        shutil.rmtree(old)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder."""
    with _opened(folder) as handle:
        os.fsync(handle)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
