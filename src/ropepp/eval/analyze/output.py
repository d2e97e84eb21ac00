"""What an analysis leaves in its folder: NAME.csv, NAME.json, figures, and TensorBoard events."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ropepp.files import replacing_file, write_json, write_text
from ropepp.runs.events import EVENTS, write_events
from ropepp.runs.machine import provenance
from ropepp.runs.table import to_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]
# Okabe and Ito's palette, which the colour-blind can tell apart; the first two are real, imaginary.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DPI = 80


def save(
    folder: Path,
    name: str,
    table: Table,
    facts: Mapping[str, Any],
    figures: Mapping[str, Callable[[Path], None]],
    scalars: Mapping[str, Mapping[int, float]],
) -> None:
    """Writes everything and prints the names of the files; replaces what an earlier call wrote. The
    ``table`` is the .csv, and in the .json with ``facts``; ``figures`` are by file name without
    suffix what writes a PNG to a path, ``scalars`` by tag values by step, for TensorBoard."""
    from matplotlib.image import imread
    from torch.utils.tensorboard.summary import image, scalar

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.csv", to_csv(table))
    made = {
        "command": shlex.join(["ropepp", *sys.argv[1:]]),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **provenance(),
    }
    write_json(folder / f"{name}.json", {**facts, **made, "table": list(table)})
    images = {key: folder / f"{key}.png" for key in figures}
    for key, draw in figures.items():
        draw(images[key])
    old = list(folder.glob(f"*tfevents*.{name}"))
    found = [(step, scalar(tag, x)) for tag, own in scalars.items() for step, x in own.items()]
    for key, path in images.items():
        found.append((0, image(f"{name}/{key}", imread(path), dataformats="HWC")))
    write_events(folder / f"{EVENTS}{time.time():.9f}.{name}", found)
    for file in old:
        file.unlink()
    for path in (folder / f"{name}.csv", folder / f"{name}.json", *images.values()):
        print(path)


@contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of that many inches with large type, written as PNG when the block ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.size": 16, "axes.titlesize": 18, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing_file(path) as file:
            figure.savefig(file, dpi=DPI, format="png")


def draw_intervals(
    panel: "Axes", x: Floats, table: Table, keys: tuple[str, str, str], **style: Any
) -> None:
    """Means with their intervals; ``keys`` are those of mean, lower and upper end in a line."""
    mean, low, high = np.array([[line[key] for key in keys] for line in table], dtype=float).T
    # An end may lie on the wrong side of the mean by rounding.
    sizes = np.abs(np.stack([low, high]) - mean)
    panel.errorbar(x, mean, sizes, capsize=5, linewidth=2, **{"markersize": 8, **style})
