"""Documents from tables: parquet files, and datasets of the `datasets` library.

Both libraries are large and optional: they are imported when a source needs them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from ropepp.errors import InputError

ROWS = 64  # read at a time
RANGE_BYTES = 256 << 20  # of a dataset that make up a shard, about
SPLIT = "train"


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of a dataset."""

    dataset: str  # folder of a saved one, otherwise NAME or NAME:CONFIG
    saved: bool
    start: int
    stop: int
    fingerprint: str  # what the library calls its content


def is_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    single = ("state.json", "dataset_info.json")
    return (path / "dataset_dict.json").is_file() or all((path / n).is_file() for n in single)


def find_rows(dataset: str, saved: bool) -> list[tuple[RowRange, int]]:
    """Ranges of about `RANGE_BYTES` that make up a dataset, and their bytes. Raises an `InputError`
    if the dataset cannot be loaded or has no train split."""
    table = _load(dataset, saved)
    total, rows = int(table.data.nbytes), len(table)
    count = max(1, ceil(total / RANGE_BYTES))
    fingerprint = str(getattr(table, "_fingerprint", ""))
    ends = [rows * number // count for number in range(count + 1)]
    return [
        (RowRange(dataset, saved, start, stop, fingerprint), total * (stop - start) // rows)
        for start, stop in pairwise(ends)
        if stop > start
    ]


def read_range(rows: RowRange, field: str) -> Iterator[tuple[int, Any]]:
    """Number of each row, from 0 in the dataset, and its value. Raises an `InputError` if there is
    no such column, or the dataset is another one now."""
    table = _load(rows.dataset, rows.saved)
    if str(getattr(table, "_fingerprint", "")) != rows.fingerprint:
        raise InputError(f"dataset {rows.dataset} has changed while it was read; run again")
    if field not in table.column_names:
        raise _no_field(f"dataset {rows.dataset}", field, table.column_names)
    column = table.select_columns([field]).with_format("arrow")
    for start in range(rows.start, rows.stop, ROWS):
        batch = column[start : min(start + ROWS, rows.stop)][field]
        yield from enumerate(_values(batch), start)


def read_parquet(
    path: Path, field: str, progress: Callable[[int], Any]
) -> Iterator[tuple[int, Any]]:
    """Number of each row, from 0, and its value. Raises an `InputError` if it is no parquet file,
    is damaged, or has no such column."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    size, done, reported = path.stat().st_size, 0, 0
    try:
        # Opened here: the library takes no name that is no UTF-8.
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field, file.schema_arrow.names)
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(ROWS, columns=[field]):
                yield from enumerate(_values(batch.column(0)), done)
                done += batch.num_rows
                progress(size * done // total - reported)
                reported = size * done // total
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or no parquet file: {reason}") from error


def _values(column: Any) -> Iterator[Any]:
    """Python values; bytes where text is not UTF-8."""
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError as error:
            yield error.object


def _no_field(place: str, field: str, columns: list[str]) -> InputError:
    return InputError(f"{place}: no field {field!r}; fields are {', '.join(sorted(columns)[:10])}")


@lru_cache(maxsize=1)
def _load(dataset: str, saved: bool) -> Any:
    """The train split."""
    library = import_module("datasets")
    name, _, config = dataset.partition(":")
    try:
        if saved:
            found = library.load_from_disk(dataset)
        else:
            found = library.load_dataset(name, config or None)
    except Exception as error:  # the library raises of all kinds, network errors among them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"dataset {dataset} cannot be loaded: {reason}") from error
    if not isinstance(found, dict):
        return found
    if SPLIT not in found:
        raise InputError(f"dataset {dataset} has the splits {', '.join(found)}; read is {SPLIT}")
    return found[SPLIT]
