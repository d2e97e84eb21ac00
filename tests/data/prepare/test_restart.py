"""Runs that were killed, disturbed or fed with damaged files, and what is left of them."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from helpers.corpora import run, snapshot, texts_of
from helpers.make_tree import make_tree
from helpers.raw_text import TEXTS, json_lines
from ropepp.data.prepare import encode as shards
from ropepp.data.prepare.inspect import verify
from ropepp.data.tokens.corpus import Corpus
from ropepp.errors import InputError

# Everything at the top also happens in the processes that this one starts.
SLOW = """
import sys, time
from ropepp.data.prepare import encode as shards
from ropepp.cli import main
shards.BATCH_CHARACTERS_ALONE = 20_000
encode = shards._Encoder._encode
def slow(self, batch):
    time.sleep(0.03)
    encode(self, batch)
shards._Encoder._encode = slow
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
OPTIONS = [
    *("--vocab_size", "400", "--validation_fraction", "0.2", "--on_bad_line", "skip"),
    *("--processes", "2", "--min_tokens", "20", "--sample_mb", "1"),
]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Workers alone: not the process that tracks multiprocessing's resources."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return [child for child, line in lines.items() if b"spawn_main" in line]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def finished(partial: Path) -> dict[str, int]:
    """Name and inode of the shards that are there."""
    files = partial.glob("shards/[!.]*/meta.json")
    return {file.parent.name: file.stat().st_ino for file in files}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes in /proc")
def test_killed_twice_the_result_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1_000_000, shards=8)
    script, out, partial = tmp_path / "slow.py", tmp_path / "out", tmp_path / ".out.partial"
    script.write_text(SLOW)
    command = [sys.executable, str(script), "prepare", str(tree), *OPTIONS, "--out"]
    undisturbed = tmp_path / "undisturbed"
    subprocess.run([*command, str(undisturbed)], check=True, capture_output=True)

    with subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(finished(partial)) >= 1)
        workers = children(process.pid)
        process.kill()
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_alive, workers)))
    first = finished(partial)
    assert 1 <= len(first) < 8
    assert not out.exists()

    with subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: len(finished(partial)) >= len(first) + 1)
        workers = children(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        _, message = process.communicate()
    assert process.returncode == 2
    assert "error: a process was killed while these were worked on: global-shard_0" in message
    assert "finished shards are kept: the same command goes on" in message
    assert not any(map(is_alive, workers))
    second = finished(partial)
    assert first.items() < second.items()
    assert len(second) < 8
    assert not list(partial.glob("shards/.*"))

    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert second.items() < finished(out).items()
    assert snapshot(out) == snapshot(undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("tree", "slow.py", "undisturbed", "out")
    }


GOOD = zstandard.compress(json_lines(TEXTS * 50))
LATIN = json_lines(TEXTS) + '{"text": "café"}\n'.encode("latin-1")
DAMAGES = [
    ("m.jsonl.zst", GOOD[:-20], "m.jsonl.zst is cut off inside a zstd frame"),
    ("m.jsonl.zst", b"", "m.jsonl.zst is empty; even a compressed file of nothing has bytes"),
    ("m.jsonl.zst", GOOD[:50] + b"\xff" * 20 + GOOD[70:], "m.jsonl.zst is damaged or no zstd"),
    ("m.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-9], "m.jsonl.gz is cut off inside a gzip"),
    ("m.jsonl.gz", json_lines(TEXTS), "m.jsonl.gz is damaged or no gzip file: Error -3"),
    ("m.jsonl", json_lines(TEXTS, field="content"), "m.jsonl, line 1: no field 'text'; fields are"),
    ("m.jsonl", LATIN, "m.jsonl, line 41: not UTF-8 at byte 2843 (found 0xe9)"),
    ("m.jsonl", "\n".join(TEXTS).encode("utf-16"), "m.jsonl, line 1: not UTF-8 at byte 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_file_is_named_and_the_other_shards_are_done(
    name: str, content: bytes, message: str, processes: int, tmp_path: Path
) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    make_tree(tree / "a", 40_000, shards=2, broken=0)
    make_tree(tree / "z", 40_000, shards=2, broken=0, seed=9)
    (tree / name).write_bytes(content)
    options = {"on_bad_line": "fail", "processes": processes}
    with pytest.raises(InputError) as caught:
        run(tree, out, **options)
    assert f"{tree}/{message}" in str(caught.value)
    assert str(caught.value).endswith("; 4 finished shards are kept: the same command goes on")
    assert "\n" not in str(caught.value)
    kept = finished(tmp_path / ".out.partial")
    assert len(kept) == 4
    (tree / name).unlink()
    (tree / "m.jsonl").write_bytes(json_lines(TEXTS))
    run(tree, out, **options)
    assert kept.items() < finished(out).items()
    assert snapshot(out) == snapshot(run(tree, tmp_path / "undisturbed", **options))


def test_all_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path / "tree", 60_000, shards=3, broken=0)
    (tree / "a.jsonl.gz").write_bytes(b"no")
    (tree / "b.jsonl").write_bytes(b"no\n")
    (tree / "c.jsonl.zst").write_bytes(b"no")
    with pytest.raises(InputError, match=r"a\.jsonl\.gz .* \(and 2 more, above\); 3 finished"):
        run(tree, tmp_path / "out", on_bad_line="fail")
    lines = capsys.readouterr().err.splitlines()
    also = [line for line in lines if line.startswith("also: ")]
    assert [file in line for file, line in zip(("b.jsonl", "c.jsonl.zst"), also, strict=True)]


def test_other_options_keep_what_they_do_not_change(tmp_path: Path) -> None:
    tree, out, partial = tmp_path / "tree", tmp_path / "out", tmp_path / ".out.partial"
    make_tree(tree, 100_000, shards=5, broken=0)
    (tree / "bad.jsonl").write_bytes(b"{\n" + json_lines(TEXTS))

    def fail(**options: object) -> dict[str, int]:
        with pytest.raises(InputError, match="line 1: malformed JSON"):
            run(tree, out, on_bad_line="fail", **options)
        return finished(partial)

    first = fail()
    assert len(first) == 5
    assert fail() == first
    shorter = fail(min_tokens=200)
    assert shorter.keys() == first.keys()
    assert not shorter.items() & first.items()
    run(tree, out, min_tokens=200)  # skips the line
    assert shorter.items() < finished(out).items()
    assert Corpus.open(out, "train").meta.bad_lines == 1


def test_inputs_are_known_again_by_size_and_time_or_content(tmp_path: Path) -> None:
    tree, out, partial = tmp_path / "tree", tmp_path / "out", tmp_path / ".out.partial"
    make_tree(tree, 100_000, shards=4, broken=0)
    (tree / "bad.jsonl").write_bytes(b"{\n")

    def fail() -> dict[str, int]:
        with pytest.raises(InputError, match="line 1: malformed JSON"):
            run(tree, out, on_bad_line="fail")
        return finished(partial)

    first = fail()
    files = sorted(tree.rglob("*.zst"))
    os.utime(files[0])
    assert fail() == first
    files[0].write_bytes(zstandard.compress(json_lines(TEXTS)))
    files[1].unlink()
    second = fail()
    assert len(second) == 3
    assert len(second.items() & first.items()) == 2
    # A file of a shard that lost its end, as on a disk that lies about what it has.
    tokens = next(partial.glob("shards/*/train/tokens.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert len(fail().items() & second.items()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(json_lines(TEXTS)), "has changed since the work began"),
        (lambda file: os.truncate(file, 5000), r"has changed .*\(\d+ bytes then, 5000 now\)"),
        (os.utime, "has changed since the work began"),
        (lambda file: file.unlink(missing_ok=True), "is gone; it was there when the work began"),
    ],
)
def test_a_file_that_changes_while_it_is_read(
    change: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = make_tree(tmp_path / "tree", 600_000, shards=2, broken=0)
    file = sorted(tree.rglob("*.zst"))[1]
    real = shards._Encoder._encode

    def encode(self: shards._Encoder, batch: list[tuple[str, str]]) -> None:
        real(self, batch)
        if any(text in second for _, text in batch):
            change(file)

    second = {text for name, text in texts_of(tree) if name == str(file)}
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(shards._Encoder, "_encode", encode)
    with pytest.raises(InputError, match=message) as caught:
        run(tree, tmp_path / "out")
    assert str(file) in str(caught.value)
    assert len(finished(tmp_path / ".out.partial")) == 1


LIMITED = """
import resource, sys
from ropepp.cli import main
# Larger files are refused, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_disk_that_is_full_in_the_middle(processes: str, tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    make_tree(tree / "a", 60_000, shards=2, broken=0)
    make_tree(tree / "b", 4_000_000, shards=1, broken=0)
    make_tree(tree / "c", 60_000, shards=2, broken=0, seed=5)
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    command = [
        *(sys.executable, str(script), "3000000", "prepare", str(tree), "--tokenizer", "bytes"),
        *("--out", str(out), "--processes", processes),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "tokens.bin cannot be written: File too large" in done.stderr
    assert "finished shards are kept: the same command goes on" in done.stderr
    kept = finished(tmp_path / ".out.partial")
    if processes == "1":  # of two, either may be the first to get far
        assert len(kept) == 2
    assert not list((tmp_path / ".out.partial").glob("shards/.*"))
    command[2] = "1000000000"
    subprocess.run(command, capture_output=True, check=True)
    assert kept.items() <= finished(out).items()
    Corpus.open(out, "train").verify()


def test_empty_shards_are_said_and_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make_tree(tmp_path / "tree", 60_000, shards=2, broken=0)
    (tree / "a.jsonl").write_bytes(b"")
    (tree / "b.jsonl.zst").write_bytes(zstandard.compress(b"\n" + json_lines(["", " "])))
    (tree / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    out = run(tree, tmp_path / "out")
    assert "3 of 5 shards have no documents, the first is a.jsonl" in capsys.readouterr().out
    meta = Corpus.open(out, "train").meta
    assert (meta.shards, meta.empty_documents) == (2, 2)
    Corpus.open(out, "train").verify()


def test_two_runs_do_not_work_on_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree", 60_000, shards=2, broken=0)
    real = shards._Encoder._encode

    def encode(self: shards._Encoder, batch: list[tuple[str, str]]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shards._Encoder, "_encode", real)
            with pytest.raises(InputError, match="out is being written by another process"):
                run(tree, tmp_path / "out")
        real(self, batch)

    monkeypatch.setattr(shards._Encoder, "_encode", encode)
    run(tree, tmp_path / "out")
    assert len(finished(tmp_path / "out")) == 2


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.unlink()  # a link of another corpus keeps its own
    file.write_bytes(content)


FILES = ["train/tokens.bin", "train/offsets.bin", "validation/tokens.crc32", "meta.json"]


@pytest.mark.parametrize("name", [*FILES, "bad_lines.tsv"])
def test_a_finished_shard_that_rotted_is_made_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make_tree(tmp_path / "tree", 60_000, shards=3)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    expected = snapshot(run(tree, out))
    # As after a kill before the last step; the times of the files are as they were.
    out.rename(partial)
    shard = sorted(partial.glob("shards/*"))[1]
    flip(shard / name)
    before = finished(partial)
    run(tree, out)
    assert f"{shard / name}" in (told := capsys.readouterr().err)
    assert "the shard is made again" in told
    assert snapshot(out) == expected
    changed = before.items() ^ finished(out).items()
    assert {place for place, _ in changed} == {shard.name}
    # And where the corpus is replaced: others are taken over.
    flip(out / "shards" / shard.name / name)
    run(tree, out, overwrite=True)
    assert f"{out.resolve() / 'shards' / shard.name / name}" in capsys.readouterr().err
    assert snapshot(out) == expected


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_same_command_again(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, out = make_tree(tmp_path / "tree", 60_000, shards=2), tmp_path / "out"
    options = {} if tokenizer == "bytes" else {"vocab_size": 300}
    expected = snapshot(run(tree, out, tokenizer, **options))
    capsys.readouterr()
    (tmp_path / ".out.old-0123abcd").mkdir()
    run(tree, out, tokenizer, **options)
    assert capsys.readouterr().out == f"{out} is complete: the same command has made it\n"
    assert sorted(os.listdir(tmp_path)) == ["out", "tree"]
    assert snapshot(out) == expected
    for other in ({"min_tokens": 5}, {"validation_fraction": 0.1}, {"on_bad_line": "fail"}):
        with pytest.raises(InputError, match="out exists; choose another name or pass --overwrite"):
            run(tree, out, tokenizer, **options, **other)
    file = next(out.glob("shards/*/train/tokens.bin"))
    flip(file)
    with pytest.raises(InputError, match=r"tokens\.bin is damaged: .* with --overwrite true make"):
        run(tree, out, tokenizer, **options)
    run(tree, out, tokenizer, overwrite=True, **options)
    assert snapshot(out) == expected
    (tree / "more.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(InputError, match="out exists; choose another name or pass --overwrite"):
        run(tree, out, tokenizer, **options)
    # Killed before it had its name: other options make no use of what was joined.
    os.rename(out, tmp_path / ".out.partial")
    run(tree, out, tokenizer, validation_fraction=0, **options)
    assert not (out / "validation").exists()
    verify(out)
