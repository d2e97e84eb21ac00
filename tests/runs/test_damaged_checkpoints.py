"""Damaged files of models: refused in one line, or harmless; an older one serves."""

import os
import re
import resource
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.fit_runs import arguments, curve, fit
from helpers.saved_forms import STEPS, copied
from ropepp.checksums import CHECKSUMS
from ropepp.cli import main
from ropepp.errors import InputError
from ropepp.interop.saved import SavedModel, open_model
from ropepp.train.optim import AdamW
from ropepp.train.weights import load_optimizer_from

IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def logits(saved: SavedModel) -> torch.Tensor:
    return saved.model(IDS)


def use(path: Path) -> list[torch.Tensor]:
    """All that a checkpoint or folder is read for: logits and the optimizer's moments."""
    model, moments = open_model(path).model.requires_grad_(True), []
    if not (path / "config.json").exists():
        optimizer = AdamW().build(model)
        load_optimizer_from(model, optimizer, path)
        moments = [x for state in optimizer.state.values() for x in state.values()]
    return [model(IDS).detach(), *moments]


@pytest.mark.parametrize("kind", ["single", "sharded", "folder"])
def test_a_flipped_bit_is_found_or_harmless(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, logits: torch.Tensor
) -> None:
    source: Path = request.getfixturevalue(kind)
    whole = source.parent / "scratch"
    shutil.copytree(source.parent, whole)
    place = whole / source.name
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix != ".md")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole_ones = use(place)
    assert torch.equal(whole_ones[0], logits)

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(files), st.floats(0, 1), st.integers(0, 7), st.booleans())
    def damage(file: Path, share: float, bit: int, cut: bool) -> None:
        before = file.read_bytes()
        after = bytearray(before)
        at = min(int(share * len(after)), len(after) - 1)
        after[at] ^= 1 << bit
        file.write_bytes(before[:at] if cut else after)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = use(place)
            assert all(map(torch.equal, found, whole_ones))
        except InputError as error:
            assert str(place) in str(error)  # noqa: PT017 (it may be harmless)
        finally:
            file.write_bytes(before)

    try:
        damage()
    finally:
        shutil.rmtree(whole)


def flip(file: Path, share: float = 0.1) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that may be damaged; unfinished."""
    shutil.copytree(run, tmp_path / "default" / "first")
    (tmp_path / "default" / "first" / "result.json").unlink()
    return tmp_path / "default" / "first"


def test_an_older_checkpoint_serves_where_the_newest_is_damaged(
    copy: Path, corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [copy / "checkpoints" / f"step-000000{step}.ckpt" for step in (2, 4)]
    (copy / "checkpoints" / "step-0000003.tmp").mkdir()
    (copy / "checkpoints" / ".step-0000003.tmp.partial-12345678").touch()
    flip(files[1])
    words = rf"{files[1]} is damaged: tensor .*; trying {files[0]}"
    validate = ["validate", *arguments(corpus, tmp_path, "first", ckpt_path="last", **STEPS)[1:]]
    with pytest.warns(UserWarning, match=words):
        assert main(validate) == 0
    with pytest.warns(UserWarning, match=words):
        assert open_model(copy).step == 2
    with pytest.warns(UserWarning, match=words):
        fit(corpus, tmp_path, "first", resume="auto", **STEPS)
    assert curve(copy) == curve(run)
    open_model(files[1])  # written anew
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == [f.name for f in files]
    (copy / "result.json").unlink()
    for file in files:
        flip(file)
    capsys.readouterr()
    with pytest.warns(UserWarning, match="is damaged"):
        assert main(arguments(corpus, tmp_path, "first", resume="auto", **STEPS)) == 2
    assert f"error: {files[0]} is damaged" in capsys.readouterr().err
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="torn and left out"):
        assert main(arguments(corpus, tmp_path, "first", resume="auto", **STEPS)) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_what_is_older_than_checksums_says_so(sharded: Path, folder: Path, tmp_path: Path) -> None:
    for source in (sharded, folder):
        path = copied(source, tmp_path)
        (path / CHECKSUMS).unlink()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            open_model(path)
        found = [str(one.message) for one in caught if "checksums" in str(one.message)]
        assert found == [f"{path}: its files have no checksums and are read as they are"]


def test_a_full_disk_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert main(arguments(corpus, tmp_path, "full", **STEPS)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"error: .*checkpoints/step-0000002.tmp cannot be written", err[-1])
    assert not list((tmp_path / "default" / "full" / "checkpoints").iterdir())


def test_nothing_is_written_elsewhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own writer puts checkpoints into TMPDIR first."""
    monkeypatch.setattr(tempfile, "mkstemp", None)
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    run = fit(corpus, tmp_path, "synced", **STEPS)
    file = next(i for i, name in enumerate(synced) if name.startswith(".step-0000004.tmp.partial"))
    assert {"metrics.jsonl", "checkpoints"} <= set(synced[file:])
    assert (run / "checkpoints" / "step-0000004.ckpt").exists()
