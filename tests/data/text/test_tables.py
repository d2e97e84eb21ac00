"""Parquet files and datasets; skipped where the optional packages are not installed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.corpora import documents, in_validation, run
from helpers.raw_text import TEXTS, json_lines
from ropepp.data.text import tables as rows
from ropepp.data.text.sources import find_source
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError


def write_parquet(path: Path, **columns: list[Any]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=7)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"n": list(range(40)), "text": TEXTS})
    table.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_parquet_files_are_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", 3)
    write_parquet(tmp_path / "tree/a/1.parquet", text=TEXTS[:20], n=list(range(20)))
    write_parquet(tmp_path / "tree/b/2.parquet", text=["", *TEXTS[20:]])
    out = run(tmp_path / "tree", tmp_path / "out", validation_fraction=0.25)
    for split, inside in (("train", False), ("validation", True)):
        assert documents(out, split) == [t for t in TEXTS if in_validation(t, 0.25) == inside]
    meta = Corpus.open(out, "train").meta
    assert (meta.shards, meta.empty_documents) == (2, 1)


def test_progress_in_a_parquet_file_ends_at_its_size(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=TEXTS)
    seen: list[int] = []
    found = list(rows.read_table(tmp_path / "a.parquet", "text", seen.append))
    assert found == list(enumerate(TEXTS))
    assert sum(seen) == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": TEXTS}, "a.parquet: no field 'text'; fields are content"),
        ({"text": [*TEXTS, None]}, "a.parquet, row 40: field 'text' is NoneType; allowed is a str"),
        ({"text": [1, 2]}, "a.parquet, row 0: field 'text' is int; allowed is a string"),
        ({"text": [b"ok", b"caf\xe9"]}, "a.parquet, row 1: not UTF-8 at byte 3 (found 0xe9)"),
    ],
)
def test_bad_columns(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError) as caught:
        run(tmp_path / "a.parquet", tmp_path / "out", on_bad_line="fail")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=TEXTS)
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (content[:-30], content[:40] + b"\xff" * 60 + content[100:], b"no"):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"a\.parquet is damaged or no parquet file: "
        ) as caught:
            run(tmp_path / "a.parquet", tmp_path / "out")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_saved_dataset(saved: Path, processes: int, tmp_path: Path) -> None:
    import datasets

    file = tmp_path / "same.jsonl"
    file.write_bytes(json_lines(TEXTS))
    whole = run(saved, tmp_path / "whole")
    assert Corpus.open(whole, "train").meta.name == "saved"
    same = run(file, tmp_path / "same")
    for split in ("train", "validation"):
        assert documents(whole, split) == documents(same, split)
    table = datasets.load_from_disk(str(saved))
    both = datasets.DatasetDict({"train": table, "test": table})
    both.save_to_disk(tmp_path / "both", num_shards={"train": 4, "test": 1})
    assert len(find_source(str(tmp_path / "both")).shards()) == 4
    parts = run(tmp_path / "both", tmp_path / "parts", processes=processes)
    assert documents(parts, "train") == documents(whole, "train")
    assert Corpus.open(parts, "train").meta.shards == 4


@pytest.mark.extra
def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder of files for a name, which needs no network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "named").mkdir()
    (tmp_path / "named/train.jsonl").write_bytes(json_lines(TEXTS))
    out = run(f"hub:{tmp_path}/named", tmp_path / "out")
    assert documents(out, "train") == [t for t in TEXTS if not in_validation(t, 0.2)]
    with pytest.raises(InputError, match="dataset no/such_data cannot be loaded: "):
        run("hub:no/such_data", tmp_path / "none")


def test_bad_datasets(saved: Path, tmp_path: Path) -> None:
    import datasets

    (file,) = saved.glob("*.arrow")
    with pytest.raises(InputError, match="arrow: no field 'content'; fields are n, text"):
        run(saved, tmp_path / "out", field="content")
    with pytest.raises(InputError, match="arrow, row 0: field 'n' is int; allowed is a string"):
        run(saved, tmp_path / "out", field="n", on_bad_line="fail")
    content = file.read_bytes()
    for damaged in (content[:-8], content[:-500], b"no", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="arrow is damaged or no arrow file: "):
            run(saved, tmp_path / "out")
    other = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})})
    other.save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="other has the splits test; read is train"):
        run(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("package", "source", "extra"),
    [
        ("pyarrow", "a.parquet", "parquet"),
        ("pyarrow", "a.arrow", "parquet"),
        ("datasets", "hub:some/name", "hub"),
    ],
)
def test_missing_packages_are_named(
    package: str, source: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"")
    Path("a.arrow").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        run(source, tmp_path / "out")
    assert f"{source} needs {package}" in str(caught.value)
    assert f"pip install 'ropepp[{extra}]'" in str(caught.value)
