"""Fetches the files that `ropepp evaluate --data DIR` reads; needs network and the extra hub.

    python scripts/fetch_eval_data.py DIR [NAME ...]

GPQA asks for an account: accept its terms on the hub and log in (`hf auth login`) before.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from ropepp.eval.local_data import BENCHMARKS, Benchmark
from ropepp.files import write_text


def main() -> None:
    parser = ArgumentParser(description="Fetches what `ropepp evaluate --data DIR` reads.")
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (all)"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    failed = 0
    wanted = [BENCHMARKS[name] for name in options.names or BENCHMARKS]
    for file, source in {one.file(options.data): one for one in wanted}.items():
        if file.exists():
            print(f"{file}: is there")
            continue
        try:
            print(f"{file}: {fetch(source, file):,} lines")
        except Exception as error:  # the others shall not wait for one that is gated or gone
            print(f"{file}: {source.path} cannot be fetched: {error}", file=sys.stderr)
            failed += 1
    sys.exit(1 if failed else 0)


def fetch(source: Benchmark, file: Path) -> int:
    """Writes a split of a published data set; returns the number of its lines."""
    from datasets import load_dataset

    rows = load_dataset(source.path, source.name, split=source.split)
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    write_text(file, "".join(lines))
    source.rows(file.parents[source.folder.count("/") + 1])
    return len(lines)


if __name__ == "__main__":
    main()
