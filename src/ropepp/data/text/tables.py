"""Documents from tables: parquet files, and arrow files, of which the datasets of the library
`datasets` are made. Large and optional libraries are imported when a source needs them.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ropepp.errors import InputError

ROWS = 64  # of a parquet file read at a time
SPLIT = "train"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a complete arrow file


def train_split(folder: Path) -> Path:
    """The folder of the train split where `save_to_disk` of `datasets` has written several; others
    as they are. Raises an `InputError` if there is no such split."""
    if not (folder / "dataset_dict.json").is_file():
        return folder
    if not (folder / SPLIT).is_dir():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise InputError(f"dataset {folder} has the splits {splits}; read is {SPLIT}")
    return folder / SPLIT


def hub_files(dataset: str) -> list[Path]:
    """The arrow files of the train split of a dataset, NAME or NAME:CONFIG, which is downloaded
    first. Raises an `InputError` if it cannot be loaded."""
    name, _, config = dataset.partition(":")
    try:
        found = import_module("datasets").load_dataset(name, config or None, split=SPLIT)
    except Exception as error:  # the library raises of all kinds, network errors among them
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"dataset {dataset} cannot be loaded: {reason}") from error
    return [Path(file["filename"]) for file in found.cache_files]


def read_table(path: Path, field: str, progress: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """Number of each row, from 0, and its value. Raises an `InputError` if it is no parquet or
    arrow file, as its name says, is damaged, or has no such column."""
    arrow, kind = import_module("pyarrow"), path.suffix.lower()[1:]
    size, done, reported = path.stat().st_size, 0, 0
    try:
        # Opened here: the library takes no name that is no UTF-8.
        with path.open("rb") as raw:
            if kind == "arrow":
                raw.seek(-len(END), 2)
                if raw.read() != END:
                    raise OSError("its end is missing")
                raw.seek(0)
                batches = table = import_module("pyarrow.ipc").open_stream(raw)
                names = table.schema.names
            else:
                table = import_module("pyarrow.parquet").ParquetFile(raw)
                names = table.schema_arrow.names
                batches = table.iter_batches(ROWS, columns=[field])
            if field not in names:
                columns = ", ".join(sorted(names)[:10])
                raise InputError(f"{path}: no field {field!r}; fields are {columns}")
            for batch in batches:
                yield from enumerate(_values(batch.column(field)), done)
                done += batch.num_rows
                here = raw.tell() if kind == "arrow" else size * done // table.metadata.num_rows
                progress(here - reported)
                reported = here
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or no {kind} file: {reason}") from error


def _values(column: Any) -> Iterator[Any]:
    """Python values; bytes where text is not UTF-8."""
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError as error:
            yield error.object
