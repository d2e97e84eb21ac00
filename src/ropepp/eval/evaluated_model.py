"""A model that is being evaluated, and the file of what was measured of it already."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ropepp import __version__
from ropepp.data.tokenizer import Tokenizer
from ropepp.files import disk_errors
from ropepp.interop.saved import SavedModel
from ropepp.model.transformer import Transformer


class ResultCache(dict[str, Any]):
    """Values of finished items by key, in a file a JSON line each, appended as soon as they are
    known. A line that a kill has torn is not read, and measured again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        with disk_errors(path):
            content = path.read_bytes() if path.exists() else b""
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                self[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        self._torn = bool(content) and not content.endswith(b"\n")

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Appends entries, which have ``key`` and ``value`` and anything for a reader; values that
        cannot be written are kept in memory alone, with a warning."""
        entries = list(entries)
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n" * self._torn + lines)
            self._torn = False
        except OSError as error:
            if not self._torn:
                reason = error.strerror or error
                print(f"{self.path} cannot be written: {reason}; going on", file=sys.stderr)
            self._torn = True
        # What a later run reads is what this one uses.
        self.update((entry["key"], json.loads(json.dumps(entry["value"]))) for entry in entries)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with all that its evaluation needs."""

    name: str  # what tables call it
    saved: SavedModel
    tokenizer: Tokenizer
    results: ResultCache  # where finished items are kept
    batch_tokens: int  # most of a batch, padding counted; a single longer row is a batch
    identity: str  # see `identify`

    @property
    def model(self) -> Transformer:
        """The model itself."""
        return self.saved.model

    def measure(
        self,
        task: str,
        length: int | None,
        contents: Sequence[str],
        batches: Sequence[list[int]],
        run: Callable[[list[int]], Sequence[Any]],
    ) -> list[Any]:
        """The values of all items, of which only unfinished batches are run.

        A batch runs as a whole or not at all, since other neighbours change the last bits of a
        value: an evaluation that was killed and goes on gives what an undisturbed one does.

        ``task`` and ``length``, the context's in tokens, name them; ``contents`` are digests of all
        that decides a value, ``batches`` their indices, each in one, and ``run`` gives the values
        (plain JSON) of a batch.
        """
        keys = [digest(self.identity, task, length, i, own) for i, own in enumerate(contents)]
        todo = [batch for batch in batches if any(keys[i] not in self.results for i in batch)]
        label = f"{self.name} {task}" + (f" {length}" if length else "")
        for batch in tqdm(todo, desc=label, unit="batch"):
            self.results.add(
                {"key": keys[i], "model": self.name, "task": task, "length": length, "index": i}
                | {"value": value}
                for i, value in zip(batch, run(batch), strict=True)
            )
        return [self.results[key] for key in keys]


def identify(saved: SavedModel) -> str:
    """A digest of what decides a model's numbers: files (name, size, time), how it computes."""
    path = saved.path.resolve()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    weight = saved.model.embed_tokens.weight
    return digest(stats, str(weight.dtype), weight.device.type, __version__)


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of plain JSON values."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, of at most ``batch_tokens`` with
    padding; a longer one is alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
