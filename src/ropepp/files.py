"""Files and folders that are complete or absent; needs Python's standard library alone."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ropepp.errors import InputError

UNFINISHED = "user.ropepp.unfinished"
_renamed: list[Path | None] = []  # by the present command


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON, completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name, waits until the disk has it, and renames, so that the file is
    complete or absent; missing parents are made."""
    with disk_errors(path), replacing_file(path) as file:
        # A name of a file may be no Unicode text.
        file.write(text.encode(errors="backslashreplace"))


def check_name(name: str, key: str) -> None:
    """Checks what becomes the name of one folder; messages call it `key`. Raises an `InputError` if
    it is empty or too long, or another program might take it for something else: a path, a hidden
    file, an option, a variable."""
    fine = name.isprintable() and not set(name) & set("/\\$") and len(os.fsencode(name)) < 256
    if not fine or not name or name[0] in ".-~ " or name[-1] in ". ":
        raise InputError(
            f"{key} is {name[:300]!r}; allowed: up to 255 printable characters without / \\ and $, "
            "none of . - ~ at the beginning, no dot at the end, no space at either"
        )


def run_folder(logs: Path, experiment: str, run: str) -> Path:
    """The folder of a run, LOGS/EXPERIMENT/RUN, for all that writes there; the names of runs of
    sweeps and pipelines have several parts. Raises an `InputError` if a name is not allowed, see
    `check_name`, or links lead out of the experiment."""
    if "\0" in str(logs):
        raise InputError(f"logs is {str(logs)!r}; allowed: a folder")
    check_name(experiment, "experiment")
    for part in run.split("/"):
        check_name(part, f"a part of the run {run[:300]!r}" if "/" in run else "run")
    within, folder = os.path.realpath(logs / experiment), logs / experiment / run
    target = os.path.realpath(folder)
    if os.path.commonpath([within, target]) != within:
        raise InputError(f"{folder} is a link out of {logs / experiment}, to {target}")
    return folder


@contextmanager
def replacing_folder(target: Path, overwrite: bool = False, clear: bool = True) -> Iterator[Path]:
    """Yields a new hidden folder beside `target` that takes its name when the block ends well, and
    is removed otherwise; missing parents are made. What had the name is removed once the new folder
    is in place; an `InputError` if there is something and `overwrite` is false. `clear` looks for
    what killed processes left, which takes long beside thousands of others."""
    final = target.resolve()
    if clear:
        clear_leftovers(final)
    require_free(final, overwrite)
    with _beside(final, Path.mkdir) as work:
        yield work
        require_free(final, overwrite)
        _rename_over(work, final)


@contextmanager
def replacing_file(target: Path) -> Iterator[BinaryIO]:
    """A new file: the target once the block ends well, or else removed; makes missing parents."""
    clear_leftovers(target)
    with _beside(target, Path.touch) as work:
        with work.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _mark(work, target)
        work.rename(target)
        sync_folder(target.parent)


@contextmanager
def _beside(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yields a new hidden file or folder beside `target`, gone afterwards unless it has another
    name by then; locked, by which others know that its process lives."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle = None
    while handle is None:
        work = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        make(work)
        with suppress(FileNotFoundError):  # somebody took it for left
            handle = os.open(work, os.O_RDONLY)
            taken = False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # where there are no locks nothing is taken for left
                taken = isinstance(error, BlockingIOError)
            if taken or not work.exists():
                os.close(handle)
                handle = None
    try:
        yield work
    except BaseException:
        remove(work)
        raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(final: Path) -> None:
    """Ends what a process was killed in that wrote a file or folder: what nobody has locked is
    removed, but for what `resuming_folder` goes on with; what was to be replaced is removed, or has
    its name again if the new one has not taken it."""
    beside, lives = f".{glob.escape(final.name)}", False
    patterns = (f"{beside}.partial", f"{beside}.partial-{8 * '[0-9a-f]'}")
    for left in (path for pattern in patterns for path in final.parent.glob(pattern)):
        try:
            with opened(left) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.suffix != ".partial":
                    remove(left)
        except OSError:
            lives = True
    for old in () if lives else final.parent.glob(f"{beside}.old-{8 * '[0-9a-f]'}"):
        with suppress(OSError):  # best effort: nobody has asked for it
            if final.exists():
                remove(old)
            else:
                old.rename(final)


def require_writable(target: Path, folder: bool = False) -> None:
    """Tries whether a file, or a folder, can be written under this name, before the work whose
    result it is to hold; leaves nothing behind. Raises an `InputError` if it cannot."""
    with disk_errors(target):
        if target.exists() and target.is_dir() != folder:
            is_one = "a folder" if target.is_dir() else "a file"
            raise FileExistsError(errno.EEXIST, f"{is_one} has this name")
        if target.is_file():
            target.open("ab").close()
        # One name for all times: what a kill leaves is gone with the next trial.
        trial = target / ".trial" if target.is_dir() else target.with_name(f".{target.name}.trial")
        missing = [parent for parent in trial.parents if not parent.exists()]
        try:
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink(missing_ok=True)
        finally:
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def require_results(folder: Path) -> None:
    """The same for a folder that results are added to, which may be no corpus and no model."""
    require_writable(folder, folder=True)
    for name, what in {"shards": "a corpus", "config.json": "a model"}.items():
        if (folder / name).exists():
            raise InputError(f"{folder} is {what}; results go to another folder (--out)")


def printable(name: str | Path) -> str:
    """A file's name as text: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


class DiskError(InputError):
    """A file could not be written, as on a full disk: trying the next one is of no use."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Makes an OSError of the block a `DiskError` that names the file."""
    try:
        yield
    except OSError as error:
        advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DiskError(f"{path} cannot be written: {error.strerror or error}{advice}") from error


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    """Makes an OSError of the block an `InputError` that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{printable(path)} cannot be read: {error.strerror or error}") from error


@contextmanager
def resuming_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """As `replacing_folder`, but the hidden folder's name depends on the target's alone: what a
    killed process left there is found again. When the block raises, an empty folder is removed, and
    the rest stays. An `InputError` also if another process works on it."""
    final = target.resolve()
    clear_leftovers(final)
    require_free(final, overwrite)
    work = final.with_name(f".{final.name}.partial")
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with opened(work) as handle:
        # One that has just finished may have renamed it since it was opened here.
        if not lock(handle, work) or not work.exists():
            raise InputError(f"{target} is being written by another process")
        try:
            yield work
            require_free(final, overwrite)
            _rename_over(work, final)
        finally:
            if work.is_dir() and not any(work.iterdir()):
                work.rmdir()


def lock(handle: int, path: Path, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Locks an open file until its process ends, however it does; False if another one holds it.
    Where the file system has no locks it says so, and all goes on."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:  # EBADF is what NFS says of folders
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
        warnings.warn(f"no lock on {path} ({error.strerror}): nobody else may use it", stacklevel=2)
    return True


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Locks a file that says who holds it; gone with its folder, if that is empty, afterwards.
    Raises a `DiskError` if it cannot be written, an `InputError` if another process holds it."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        free = lock(handle, file)
        # Its last holder may have removed it since it was opened here.
        if not free or not file.exists() or os.fstat(handle).st_ino != file.stat().st_ino:
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            raise InputError(f"{file.parent} is in use by {owner}: wait, or choose another name")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            with suppress(OSError):
                file.parent.rmdir()
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes, name: Path | None = None) -> None:
    """Writes a file and waits until the disk has it; ``name`` is the one that an error is to tell.
    Raises a `DiskError` if it cannot be written."""
    with disk_errors(name or path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free(target: Path, overwrite: bool | None = None) -> None:
    """Raises an `InputError` if `target` exists, unless a command made it that was killed before it
    said so, and `overwrite` is false, or None where there is no such option."""
    with disk_errors(target):
        exists = target.exists()
    if not exists or overwrite:
        return
    with suppress(OSError):
        if UNFINISHED in os.listxattr(target):
            return
    advice = "" if overwrite is None else " or pass --overwrite true"
    raise InputError(f"{target} exists; choose another name{advice}")


@contextmanager
def one_command() -> Iterator[None]:
    """What gets its name in this block is unfinished until the block ends, so that the same command
    can be given again after a kill at its end. Needs a file system with extended attributes."""
    _renamed.append(None)
    try:
        yield
    finally:
        for made in filter(None, _renamed):
            with suppress(OSError):
                os.removexattr(made, UNFINISHED)
        _renamed.clear()


def _mark(work: Path, final: Path) -> None:
    if _renamed:  # in a command
        with suppress(OSError):
            os.setxattr(work, UNFINISHED, b"")
        _renamed.append(final)


def _rename_over(work: Path, final: Path) -> None:
    _mark(work, final)
    old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
    replaces = final.exists()
    sync_folder(work)
    if replaces:
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if replaces:
            old.rename(final)
        raise
    sync_folder(final.parent)
    remove(old)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder."""
    with opened(folder) as handle:
        os.fsync(handle)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
