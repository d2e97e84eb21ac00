"""Checksums: of a folder's files, in a file beside them, and those that archives of tensors have
inside. Needs no torch.

CRC-32, because it keeps up with a disk and archives have it already. It finds what has rotted or
was torn, not what somebody has forged.
"""

import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from ropepp.errors import InputError
from ropepp.files import write_json
from ropepp.records import SETTINGS, Damaged, read_object

try:
    from zlib_ng.zlib_ng import crc32  # the same, three to ten times as fast
except ImportError:  # of a source tree that was not installed
    from zlib import crc32

CHECKSUMS = "checksums.json"
BLOCK_BYTES = 1 << 22  # of a file, compared at once
MAX_PLAIN_BYTES = 1 << 20  # in an archive besides its tensors, and for each of these:
MAX_PLAIN_BYTES_PER_TENSOR = 1 << 10
THREADS = min(8, os.cpu_count() or 1)


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes those of some of a folder's files into `CHECKSUMS` beside them."""
    sums = {name: " ".join(file_sums(folder / name)) for name in sorted(names)}
    write_json(folder / CHECKSUMS, {"block_bytes": BLOCK_BYTES, "crc32": sums})


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compares files of a folder with their checksums; one warning a folder says that some have
    none. Raises `Damaged` if a file is not the one that was written."""
    block_bytes, known = _read(folder / CHECKSUMS)
    for name in names:
        file = folder / name
        if name not in known:
            # Once a folder, whoever calls.
            warnings.warn(f"{folder}: its files have no checksums and are read as they are")  # noqa: B028
        elif file.is_file() and file_sums(file, block_bytes) != known[name]:
            raise Damaged(
                f"{file} is damaged: its checksum in {CHECKSUMS} is another one (delete that file "
                "if this one was changed on purpose)"
            )


def listed(folder: Path) -> list[str]:
    """Names of the files that have checksums."""
    return list(_read(folder / CHECKSUMS)[1])


def file_sums(file: Path, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """CRC-32 of each block of a file, hexadecimal."""
    with file.open("rb", buffering=0) as handle, ThreadPoolExecutor(THREADS) as pool:
        starts = range(0, os.fstat(handle.fileno()).st_size, block_bytes)
        blocks = pool.map(lambda at: crc32(os.pread(handle.fileno(), block_bytes, at)), starts)
        return [f"{block:08x}" for block in blocks]


def crc32s(buffers: Sequence[memoryview]) -> list[int]:
    """CRC-32 of each buffer."""
    with ThreadPoolExecutor(THREADS) as pool:
        # The largest first, so that all threads end together.
        first = sorted(range(len(buffers)), key=lambda i: -buffers[i].nbytes)
        sums = dict(zip(first, pool.map(lambda i: crc32(buffers[i]), first), strict=True))
        return [sums[i] for i in range(len(buffers))]


def archive_sums(file: Path | BytesIO, name: Path) -> set[tuple[int, int]]:
    """Size and CRC-32 of the bytes of each tensor in an archive of `torch.save`, after reading what
    it holds besides and comparing that with its checksums. Messages call it `name`.

    Raises `Damaged` if it is no complete archive, or other bytes than were written, and an
    `InputError` if it holds more plain data than tensors need."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            tensors = {info.filename for info in infos if "/data/" in info.filename}
            limit = MAX_PLAIN_BYTES + MAX_PLAIN_BYTES_PER_TENSOR * len(tensors)
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{info.filename} is compressed")
                with archive.open(info) as record:  # which compares the two headers
                    if info.filename in tensors:
                        continue
                    if info.file_size > limit:
                        raise InputError(
                            f"{name}: {info.filename} has {info.file_size:,} bytes; allowed for "
                            f"{len(tensors):,} tensors: {limit:,}"
                        )
                    record.read()
            return {(one.file_size, one.CRC) for one in infos if one.filename in tensors}
    except InputError:
        raise
    except Exception as error:  # a damaged directory of an archive raises anything
        raise Damaged(f"{name} is damaged: it is no complete archive ({error})") from error


def _read(file: Path) -> tuple[int, dict[str, list[str]]]:
    if not file.is_file():
        return BLOCK_BYTES, {}
    content = read_object(file, SETTINGS)
    try:
        sums = {name: own.split() for name, own in content["crc32"].items()}
        return max(4096, content["block_bytes"]), sums
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{file} is damaged: {error!r}") from error
