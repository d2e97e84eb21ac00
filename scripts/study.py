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

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml

from ropepp.errors import InputError
from ropepp.files import held, write_json, write_text
from ropepp.runs.records import read_result
from study_plan import METRIC, Key, Plan, read_study
from study_records import curve, curve_lines

DROPPED = ("hyper_parameters", "loss_by_position", "evaluation")  # trial has what matters
POLL = 20.0


class Study(Plan):
    """Runs what is left of a study, and keeps what has been run."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.again: dict[Key, dict[str, Any]] = {}  # records of runs that are to be made again

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
            "logs": str(self.logs.relative_to(self.root)),
        }
        file = self.logs / f"{part}.yaml"
        write_text(file, yaml.safe_dump(sweep, sort_keys=False))
        return file

    @property
    def socket(self) -> Path:
        return self.logs / "warm.sock"

    def run(self, part: str, jobs: int) -> None:
        """Runs what is left of a part, collecting results as they come."""
        for key in self.lost(part):
            self.again[key] = self.records.pop(key)
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
        driver = subprocess.Popen(command, cwd=self.root, env=environment)
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

    def restore(self, part: str) -> None:
        """Lets the sweep know what an earlier clone has run, as what it would plan today: since
        then keys may have got other names or defaults."""
        coming = {}
        for own, name, seed in self.records.keys() & self.wanted(part):
            folder = self.logs / own / name / f"seed-{seed}"
            if not (folder / "result.json").exists():
                coming[folder] = self.records[own, name, seed]
        if not coming:
            return
        command = [sys.executable, "-m", "ropepp.cli", "sweep", "init", str(self.write_sweep(part))]
        if code := subprocess.call(command, cwd=self.root, stdout=subprocess.DEVNULL):
            sys.exit(code)
        for folder, record in coming.items():
            lines = curve_lines(record["curve"])
            write_text(folder / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
            write_json(folder / "result.json", record["result"])

    def copy(self, part: str) -> None:
        """Takes the finished runs of another study that are this part's too; an `InputError` if
        they were made with something else."""
        if "same" not in self.parts[part]:
            return
        source = self.logs.parent / self.parts[part]["same"]
        name, _, there = self.parts[part]["same"].partition("/")
        other = read_study(self.file.with_stem(name.replace("-", "_")))
        if self.shared(self.content, part) != self.shared(other, there):
            raise InputError(f"{self.file}: parts.{part} has another base or set than {source}")
        for row in self.rows(part):
            for seed in self.seeds(part):
                own = Path(row.name, f"seed-{seed}")
                there, here = source / own, self.logs / part / own
                if here.exists() or not (there / "result.json").exists():
                    continue
                self.check(row, json.loads((there / "trial.json").read_text()))
                coming = here.with_name(f".{here.name}")
                shutil.rmtree(coming, ignore_errors=True)
                shutil.copytree(there, coming)
                coming.rename(here)

    @staticmethod
    def shared(content: dict[str, Any], part: str) -> Any:
        """What all runs of a part have in common."""
        how = content["parts"][part]
        return how.get("base", content["base"]), how.get("set", {})

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
            result = read_result(file.parent)
            if not result:  # damaged: the sweep makes it again
                continue
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
            if known := self.again.pop((part, row, seed), None):
                one, other = (own["result"].get(METRIC) for own in (known, record))
                if one != other:
                    print(f"{part}/{row}/seed-{seed} was {one}, and is {other} now", flush=True)
        if new:
            kept = self.records | self.again
            keys = sorted(kept, key=lambda key: (list(self.parts).index(key[0]), *key[1:]))
            lines = [json.dumps(kept[key], separators=(",", ":")) for key in keys]
            write_text(self.store, "\n".join(lines) + "\n")

    def measure(self, part: str, run: Path) -> dict[str, Any] | None:
        """What a part asks for of a finished run, kept beside it; None if it cannot be had."""
        name, out = self.parts[part]["measure"], run / "measures.json"
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if found.get("measure") != name:
            command = [sys.executable, "-S", "scripts/warm.py", "python", str(self.socket)]
            command += ["scripts/study_measures.py", name, str(run)]
            one = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.call(command, cwd=self.root, env=one):
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
    folder = Path(__file__).resolve().parent.parent / "configs" / "study"
    file = folder / f"{options.name}.yaml"
    if not file.is_file():
        known = ", ".join(path.stem for path in folder.glob("*.yaml"))
        sys.exit(f"error: {options.name} is no study; allowed: {known}")
    study = Study(file)
    if options.until is not None and options.until not in study.parts:
        sys.exit(f"error: --until is {options.until}; allowed: {', '.join(study.parts)}")
    study.check_records()
    from study_page import read_page, write_page

    read_page(study)  # before long work
    if options.page and not study.records:
        sys.exit(f"error: {study.store} has no runs to make a page of")
    if not options.page:
        with held(study.logs / "study.lock"):
            run(study, options.jobs, options.until)
    print(write_page(study))
    if not options.page and not options.until and (missing := study.missing()):
        sys.exit("error: these runs failed, see their folders: " + ", ".join(missing))


def run(study: Study, jobs: int, until: str | None) -> None:
    """All parts, in order."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    if trusted := study.content.get("trust"):
        path = [str(study.root / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"ROPEPP_TRUST": ",".join(trusted), "PYTHONPATH": os.pathsep.join(path)}
    prepare = study.content["prepare"]
    if not Path(study.root, prepare[-1]).exists():
        command = [sys.executable, "-m", "ropepp.cli", "prepare", *prepare]
        subprocess.run(command, cwd=study.root, check=True)
    warm = [sys.executable, "scripts/warm.py", "serve", str(study.socket)]
    study.socket.unlink(missing_ok=True)
    server = subprocess.Popen(warm, cwd=study.root, start_new_session=True)
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
