"""``ropepp configs``."""

import shutil
from pathlib import Path

import ropepp
from ropepp.files import disk_errors, replacing_folder, require_free
from ropepp.options import Parser

PACKAGE = Path(ropepp.__file__).parent
# Where an installed package has them, and a checkout.
PLACES = (PACKAGE / "configs", PACKAGE.parents[1] / "configs")


def main(args: list[str]) -> None:
    """Copies the shipped configurations; ``args`` are those after ``ropepp configs``."""
    parser = Parser("ropepp configs", description="Copies the shipped configurations.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("configs"), help="a new one")
    target = parser.parse_args(args).folder
    require_free(target)
    source = next(place for place in PLACES if place.is_dir())
    with disk_errors(target), replacing_folder(target) as new:
        for file in sorted(source.rglob("*.yaml")):
            place = new / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    print(f"written to {target}; next: ropepp fit --config {target}/experiment/quickstart.yaml")
