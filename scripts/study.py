"""Runs a study of configs/study: many sweeps in order, their results kept in docs/results, a page.

A study's YAML names what all runs share (``base``), short names of keys (``keys``), the
variants, and ``parts``, each of which becomes a sweep of that many seeds:

* ``cells`` or ``grid``: settings that every variant of the part is trained with; ``recipe: NAME``
  in a cell stands for the variant's own settings in ``recipes``;
* ``best: {of: [PARTS], keep: K}``: begins with the K settings with which each variant (or the one
  named by ``variant``) had the lowest mean loss in earlier parts; ``cells`` or ``best_cells`` are
  laid over them;
* ``base``: instead of the study's; ``set``: settings of all runs of the part;
* ``measure``: what of ``study_measures`` is measured of every run;
* ``begin: PART/ROW``: begins with the weights of an earlier run, of the same seed of this row;
* ``same: STUDY/PART``: runs that are another study's, of the same rows and seeds, are copied from
  its folder where this machine has them, and run where it does not.

``trust`` names modules of this folder that the study's runs import.

Everything goes on after any kill. Results are written to docs/results/NAME/runs.jsonl as they come,
and a clone that has this file does not run them again. Runs that fail twice are listed at the end.
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ropepp.errors import InputError
from ropepp.files import write_json, write_text
from study_records import agree, curve, curve_lines

ROOT = Path(__file__).resolve().parent.parent
METRIC = "validation_loss"
DROPPED = ("hyper_parameters", "loss_by_position", "evaluation")  # trial has what matters
POLL = 20.0


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone: a variant with a cell's settings."""

    variant: str
    cell: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.cell}"


class Study:
    """A study's YAML and what has been run of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content = yaml.safe_load(file.read_text())
        self.name: str = self.content["name"]
        self.parts: dict[str, dict[str, Any]] = self.content["parts"]
        self.logs = ROOT / "logs" / "study" / self.name
        self.store = ROOT / "docs" / "results" / self.name / "runs.jsonl"
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}
        if self.store.is_file():
            for line in self.store.read_text().splitlines():
                record = json.loads(line)
                self.records[record["part"], record["row"], record["trial"]["seed"]] = record

    # What there is to run

    def rows(self, part: str) -> list[Row]:
        """The rows of a part; an `InputError` if it needs the best of parts that lack runs."""
        how = self.parts[part]
        found = [
            Row(variant, cell, self.with_recipe(variant, settings))
            for cell, settings in self.cells(how)
            for variant in how["variants"]
        ]
        if "best" not in how:
            return found
        over = how.get("best_cells", how.get("cells", {"best": {}}))
        found = found if "best_cells" in how else []
        best = how["best"]
        for variant in how["variants"]:
            ranked = self.ranked(best.get("variant", variant), best["of"])
            for cell, settings in ranked[: best["keep"]]:
                if best["keep"] > 1:
                    found.append(Row(variant, cell, settings))
                    continue
                found += [Row(variant, c, settings | self.long(own)) for c, own in over.items()]
        return found

    def cells(self, how: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and settings that a part states itself."""
        if "grid" in how:
            for values in itertools.product(*how["grid"].values()):
                pairs = list(zip(how["grid"], values, strict=True))
                yield "_".join(f"{key}-{value:g}" for key, value in pairs), self.long(dict(pairs))
        elif "cells" in how or "best" not in how:
            for cell, own in how.get("cells", {"today": {}}).items():
                yield cell, self.long(own)

    def with_recipe(self, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
        """A cell's settings, which come behind those of the recipe that it may name."""
        if "recipe" not in settings:
            return settings
        rest = {key: value for key, value in settings.items() if key != "recipe"}
        return self.long(self.content["recipes"][settings["recipe"]][variant]) | rest

    def long(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings by the keys of ``fit``."""
        return {self.content["keys"].get(key, key): value for key, value in settings.items()}

    def ranked(self, variant: str, of: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """A variant's cells and settings by their mean loss, of those with the most seeds."""
        losses: dict[str, list[float]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for part in of:
            for row in self.rows(part):
                if row.variant != variant:
                    continue
                settings[row.cell] = row.settings
                for seed in self.parts[part]["seeds"]:
                    if (part, row.name, seed) not in self.records:
                        raise InputError(f"{part} is not complete: {row.name}, seed {seed}")
                    losses.setdefault(row.cell, []).append(self.loss(part, row.name, seed))
        most = max(map(len, losses.values()))
        means = {cell: sum(own) / most for cell, own in losses.items() if len(own) == most}
        return [(cell, settings[cell]) for cell in sorted(means, key=means.__getitem__)]

    def loss(self, part: str, row: str, seed: int) -> float:
        value = self.records[part, row, seed]["result"][METRIC]
        return math.inf if value is None or not math.isfinite(value) else float(value)

    # Sweeps

    def write_sweep(self, part: str) -> Path:
        """The YAML of a part's sweep."""
        rows = self.rows(part)
        given = {name: dict(own) for name, own in self.content["variants"].items()}
        titles = {name: own.pop("display", name) for name, own in given.items()}
        variants = {
            row.name: given[row.variant]
            | row.settings
            | {"display": f"{titles[row.variant]}, {row.cell}"}
            for row in rows
        }
        how = self.parts[part]
        launcher = f"{{python}} -S scripts/warm.py run {self.socket} fit {{args}}"
        if "begin" in how:
            row = self.logs / how["begin"]
            launcher = f"{{python}} -S scripts/study_begin.py {self.socket} {row} {{args}}"
        sweep = {
            "name": part,
            "question": f"Part {part} of the study {self.name}.",
            "base": [
                str((self.file.parent / file).resolve())
                for file in how.get("base", self.content["base"])
            ],
            "set": how.get("set", {}),
            "variants": variants,
            "seeds": how["seeds"],
            "launcher": launcher,
            "logs": str(self.logs.relative_to(ROOT)),
        }
        file = self.logs / f"{part}.yaml"
        write_text(file, yaml.safe_dump(sweep, sort_keys=False))
        return file

    @property
    def socket(self) -> Path:
        return self.logs / "warm.sock"

    def run(self, part: str, jobs: int) -> None:
        """Runs what is left of a part, collecting results as they come."""
        lost = self.lost(part)
        for key in lost:
            del self.records[key]
        if self.wanted(part) <= self.records.keys():
            return
        self.copy(part)
        self.restore(part)
        sweep = ["sweep", "run", str(self.write_sweep(part)), "--jobs", str(jobs)]
        for options in ((), ("--retry-failed",)):
            self.drive(part, [sys.executable, "-m", "ropepp.cli", *sweep, *options], jobs)
            if self.wanted(part) <= self.records.keys():
                return

    def drive(self, part: str, command: list[str], jobs: int) -> None:
        """Runs a part's sweep to its end, collecting results as they come."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"} if jobs > 1 else dict(os.environ)
        driver = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            while driver.poll() is None:
                time.sleep(POLL)
                self.collect(part)
        except BaseException:
            driver.send_signal(signal.SIGTERM)
            driver.wait()
            raise
        finally:
            self.collect(part)
        if driver.returncode not in (0, 1):  # 1: a run failed
            sys.exit(driver.returncode)

    def seeds(self, part: str) -> list[int]:
        return list(self.parts[part]["seeds"])

    def wanted(self, part: str) -> set[tuple[str, str, int]]:
        """All runs of a part."""
        return {(part, row.name, seed) for row in self.rows(part) for seed in self.seeds(part)}

    def lost(self, part: str) -> list[tuple[str, str, int]]:
        """Runs that another clone has made, with whose weights a missing one begins: they are made
        again, since weights are not kept with results."""
        parents = {
            (how["begin"].partition("/")[2], seed)
            for name, how in self.parts.items()
            if how.get("begin", "").startswith(f"{part}/")
            for seed in self.lacks(name)
        }
        return [
            (part, row, seed)
            for _, row, seed in sorted(self.records.keys() & self.wanted(part))
            if (row, seed) in parents
            and not any((self.logs / part / row / f"seed-{seed}").glob("checkpoints/step-*"))
        ]

    def lacks(self, part: str) -> set[int]:
        """Seeds of which a part lacks a run; all if it needs the best of a part that lacks some."""
        try:
            return {seed for *_, seed in self.wanted(part) - self.records.keys()}
        except InputError:
            return set(self.seeds(part))

    def restore(self, part: str) -> None:
        """Lets the sweep know what an earlier clone has run, as what it would plan today: since
        then keys may have got other names or defaults. An `InputError` if the study asks for
        another value now."""
        rows = {row.name: row for row in self.rows(part)}
        coming = {}
        for own, name, seed in self.records.keys() & self.wanted(part):
            folder = self.logs / own / name / f"seed-{seed}"
            if not (folder / "result.json").exists():
                coming[folder] = self.records[own, name, seed]
                self.check(rows[name], coming[folder]["trial"])
        if not coming:
            return
        command = [sys.executable, "-m", "ropepp.cli", "sweep", "init", str(self.write_sweep(part))]
        if code := subprocess.call(command, cwd=ROOT, stdout=subprocess.DEVNULL):
            sys.exit(code)
        for folder, record in coming.items():
            lines = curve_lines(record["curve"])
            write_text(folder / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
            write_json(folder / "result.json", record["result"])

    def check(self, row: Row, trial: dict[str, Any]) -> None:
        """Refuses a run that was made with another value of a row's settings."""
        asked = self.content["variants"][row.variant] | row.settings
        for key, value in asked.items():
            known = trial["overrides"].get(key)
            if key in trial["overrides"] and not agree(known, value):
                raise InputError(
                    f"{self.file}: {row.name}: {key} is {value}, but {self.store} has seed "
                    f"{trial['seed']} with {known}: give the cell or the variant another name"
                )

    def copy(self, part: str) -> None:
        """Takes the finished runs of another study that are this part's too."""
        if "same" not in self.parts[part]:
            return
        source = self.logs.parent / self.parts[part]["same"]
        for row in self.rows(part):
            for seed in self.seeds(part):
                own = Path(row.name, f"seed-{seed}")
                there, here = source / own, self.logs / part / own
                if here.exists() or not (there / "result.json").exists():
                    continue
                coming = here.with_name(f".{here.name}")
                shutil.rmtree(coming, ignore_errors=True)
                shutil.copytree(there, coming)
                coming.rename(here)

    def missing(self) -> list[str]:
        """Runs without a result, of all parts."""
        found = set().union(*map(self.wanted, self.parts)) - self.records.keys()
        return [f"{part}/{row}/seed-{seed}" for part, row, seed in sorted(found)]

    def collect(self, part: str) -> None:
        """Takes finished runs into the store."""
        new = False
        for file in (self.logs / part).glob("*/seed-*/result.json"):
            row, seed = file.parent.parent.name, int(file.parent.name.removeprefix("seed-"))
            if (part, row, seed) in self.records:
                continue
            result = json.loads(file.read_text())
            record = {
                "part": part,
                "row": row,
                "trial": json.loads((file.parent / "trial.json").read_text()),
                "result": {key: value for key, value in result.items() if key not in DROPPED},
                "curve": curve(file.parent / "metrics.jsonl"),
            }
            if "measure" in self.parts[part]:
                record["measures"] = self.measure(part, file.parent)
                if record["measures"] is None:  # tried again when there is another result
                    continue
            self.records[part, row, seed] = record
            new = True
        if new:
            keys = sorted(self.records, key=lambda key: (list(self.parts).index(key[0]), *key[1:]))
            lines = [json.dumps(self.records[key], separators=(",", ":")) for key in keys]
            write_text(self.store, "\n".join(lines) + "\n")

    def measure(self, part: str, run: Path) -> dict[str, Any] | None:
        """What a part asks for of a finished run, kept beside it; None if it cannot be had."""
        name, out = self.parts[part]["measure"], run / "measures.json"
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if found.get("measure") != name:
            command = [sys.executable, "-S", "scripts/warm.py", "python", str(self.socket)]
            command += ["scripts/study_measures.py", name, str(run)]
            one = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.call(command, cwd=ROOT, env=one):
                print(f"{name} of {run} could not be measured", flush=True)
                return None
            found = json.loads(out.read_text())
        return found


def main() -> None:
    parser = ArgumentParser("scripts/study", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a file of configs/study, without its ending")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument("--until", help="the last part to run; all unless given")
    parser.add_argument("--page", action="store_true", help="run nothing, make the page anew")
    options = parser.parse_args()
    file = ROOT / "configs" / "study" / f"{options.name}.yaml"
    if not file.is_file():
        known = ", ".join(path.stem for path in file.parent.glob("*.yaml"))
        sys.exit(f"error: {options.name} is no study; allowed: {known}")
    study = Study(file)
    if options.until and options.until not in study.parts:
        sys.exit(f"error: --until is {options.until}; allowed: {', '.join(study.parts)}")
    if not options.page:
        run(study, options.jobs, options.until)
    from study_page import write_page

    print(write_page(study))
    if not options.page and not options.until and (missing := study.missing()):
        sys.exit("error: these runs failed, see their folders: " + ", ".join(missing))


def run(study: Study, jobs: int, until: str | None) -> None:
    """All parts, in order."""
    study.logs.mkdir(parents=True, exist_ok=True)
    if trusted := study.content.get("trust"):
        path = [str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"ROPEPP_TRUST": ",".join(trusted), "PYTHONPATH": os.pathsep.join(path)}
    prepare = study.content["prepare"]
    if not Path(ROOT, prepare[-1]).exists():
        command = [sys.executable, "-m", "ropepp.cli", "prepare", *prepare]
        subprocess.run(command, cwd=ROOT, check=True)
    warm = [sys.executable, "scripts/warm.py", "serve", str(study.socket)]
    study.socket.unlink(missing_ok=True)
    server = subprocess.Popen(warm, cwd=ROOT, start_new_session=True)
    try:
        while not study.socket.exists():
            if server.poll() is not None:
                sys.exit("error: scripts/warm.py did not start")
            time.sleep(0.2)
        for part in study.parts:
            print(f"part {part}", flush=True)
            study.run(part, jobs)
            if part == until:
                break
    finally:
        server.terminate()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(f"error: {error}")
