"""``ropepp configs``."""

import shutil
from argparse import ArgumentParser
from pathlib import Path

import ropepp
from ropepp.errors import InputError
from ropepp.files import disk_errors, replacing_folder

PACKAGE = Path(ropepp.__file__).parent
# Where an installed package has them, and a checkout.
PLACES = (PACKAGE / "configs", PACKAGE.parents[1] / "configs")


def main(args: list[str]) -> None:
    """Copies the shipped configurations; ``args`` are those after ``ropepp configs``."""
    parser = ArgumentParser("ropepp configs", description="Copies the shipped configurations.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("configs"), help="a new one")
    target = parser.parse_args(args).folder
    if target.exists():
        raise InputError(f"{target} exists; give the name of a new folder")
    source = next(place for place in PLACES if place.is_dir())
    with disk_errors(target), replacing_folder(target) as new:
        for file in sorted(source.rglob("*.yaml")):
            place = new / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    print(f"written to {target}; next: ropepp fit --config {target}/experiment/quickstart.yaml")
