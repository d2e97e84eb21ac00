"""``ropepp analyze curves``: how real and imaginary heads weigh distance, and which position values
training shows them (RoPE++, arXiv 2512.07525).

With f_n the frequencies and d the distance between query and key, a pair of dimensions n adds

    real head        a_n cos(f_n d) + b_n sin(f_n d)
    imaginary head   a_n sin(f_n d) - b_n cos(f_n d)

to the score, where a_n and b_n depend on what query and key say alone. If a_n = 1 and b_n = 0 on
average, the heads weigh a distance by c_re(d) = mean_n cos(f_n d) and c_im(d) = mean_n sin(f_n d).

Within a trained length, f_n d runs from 0 to f_n (length - 1). A real head alone multiplies a_n by
cos over that range and b_n by sin. Where an imaginary head shares the query, a_n meets sin too, and
b_n meets -cos: the paper's wider range of positional information. `ranges_met` has these ranges, of
all angles between the ends, not of whole distances alone.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ropepp.errors import InputError
from ropepp.eval.analyze.output import COLORS, Floats, canvas, save
from ropepp.model.positions import PI, RoPE, YaRN

Range = tuple[float, float]
ValueRanges = dict[str, list[Range]]
FULL = 2.0 - 1e-12  # length of [-1, 1], less rounding
POINTS = 400  # of a curve
NAMES = {
    "real a": "RoPE, $a_n$: cos",
    "both a": "RoPE++, $a_n$: cos and sin",
    "real b": "RoPE, $b_n$: sin",
    "both b": "RoPE++, $b_n$: sin and $-$cos",
}


def characteristic(frequencies: Floats, distances: Floats) -> tuple[Floats, Floats]:
    """c_re and c_im, each (N,), at distances (N,) in tokens; frequencies: (R/2,) angles a token."""
    angles = np.outer(distances, frequencies)
    return np.cos(angles).mean(1), np.sin(angles).mean(1)


def cos_range(angle: float) -> Range:
    """Smallest and largest cosine of the angles from 0 to ``angle`` >= 0."""
    return (math.cos(angle) if angle < math.pi else -1.0), 1.0


def sin_range(angle: float) -> Range:
    """Smallest and largest sine of the angles from 0 to ``angle`` >= 0."""
    high = math.sin(angle) if angle < math.pi / 2 else 1.0
    low = min(0.0, math.sin(angle)) if angle < 3 * math.pi / 2 else -1.0
    return low, high


def covered(ranges: Sequence[Range]) -> float:
    """Length of the union of ranges."""
    total, end = 0.0, -math.inf
    for low, high in sorted(ranges):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def ranges_met(angle: float) -> ValueRanges:
    """Values by which a_n and b_n are multiplied at angles from 0 to ``angle`` >= 0: by a real head
    alone ("real a", "real b"), and by both heads that share the query ("both a", "both b")."""
    cos, sin = cos_range(angle), sin_range(angle)
    negative = (-cos[1], -cos[0])
    return {"real a": [cos], "real b": [sin], "both a": [cos, sin], "both b": [sin, negative]}


def seen(frequencies: Floats, length: int) -> list[ValueRanges]:
    """What each pair of dimensions sees in ``length`` tokens."""
    return [ranges_met(angle) for angle in (frequencies * (length - 1)).tolist()]


def coverage(
    trained: Sequence[ValueRanges], reached: Sequence[ValueRanges]
) -> dict[str, dict[str, float]]:
    """How wide a range training shows, for each key of `ranges_met`, from the values of each pair
    of dimensions in training and in use. ``full``: share of the pairs whose values fill [-1, 1];
    ``both_signs``: share of those that met values of either sign; ``width``: mean share of [-1, 1];
    ``known``: mean share of the reached values that training has shown."""
    found = {}
    for key in trained[0]:
        ours = [one[key] for one in trained]
        theirs = [one[key] for one in reached]
        widths = np.array([covered(ranges) for ranges in ours])
        reach = np.array([covered(ranges) for ranges in theirs])
        union = np.array([covered([*a, *b]) for a, b in zip(ours, theirs, strict=True)])
        shared = np.divide(widths + reach - union, reach, out=np.ones_like(reach), where=reach > 0)
        signs = [min(r[0] for r in some) < 0 < max(r[1] for r in some) for some in ours]
        found[key] = {
            "full": float(np.mean(widths >= FULL)),
            "both_signs": float(np.mean(signs)),
            "width": float(widths.mean() / 2),
            "known": float(shared.mean()),
        }
    return found


def table_of(name: str, frequencies: Floats, trained: Floats) -> list[dict[str, Any]]:
    """A line of a table for each pair of dimensions, with its largest trained angle."""
    table = []
    for n, (f, angle) in enumerate(zip(frequencies.tolist(), trained.tolist(), strict=True)):
        met = ranges_met(angle)
        line = {"setting": name, "pair": n, "frequency": f, "trained_angle": angle}
        line["cos_low"], line["cos_high"] = met["real a"][0]
        line["sin_low"], line["sin_high"] = met["real b"][0]
        for key, ranges in met.items():
            line[f"share_{key.replace(' ', '_')}"] = covered(ranges) / 2
        table.append(line)
    return table


def settings(options: Namespace) -> dict[str, RoPE]:
    """The positions to look at by name: each theta as it is, and the first one with each scaling.
    An `InputError` if a scaling is not of the form PI:8 or YaRN:32, or a theta not above 1."""
    for theta in options.theta:
        if not theta > 1:
            raise InputError(f"--theta is {theta}; it must be above 1")
    found = {f"theta {theta:g}": RoPE(theta) for theta in options.theta}
    theta, length = options.theta[0], options.trained_length
    for text in options.scaling:
        name, _, number = text.partition(":")
        if name not in ("PI", "YaRN"):
            raise InputError(f"--scaling is {text!r}; allowed: PI:FACTOR, YaRN:FACTOR")
        try:
            factor = float(number)
        except ValueError as error:
            raise InputError(f"--scaling is {text!r}; {number!r} is no number") from error
        scaling = PI(factor) if name == "PI" else YaRN(factor, original_length=length)
        found[f"theta {theta:g}, {name} {factor:g}"] = RoPE(theta, scaling=scaling)
    return found


def distances(length: int) -> Floats:
    """0 and about `POINTS` distances below ``length``, in steps of about equal ratio."""
    steps = np.geomspace(1, max(1, length - 1), POINTS).round()
    return np.unique(np.concatenate([[0.0], steps]))


def analyze(options: Namespace) -> None:
    """The command; see ``ropepp analyze curves --help``."""
    if not 2 <= options.trained_length <= options.length:
        raise InputError(
            f"--trained_length is {options.trained_length} and --length {options.length}; allowed"
            " are lengths from 2 on, the trained one not above the other"
        )
    d, curves, trained, shares = distances(options.length), {}, {}, {}
    lines = []
    positions = settings(options)
    for name, position in positions.items():
        frequencies = position.frequencies(options.head_dim).double().numpy()
        plain = RoPE(position.theta).frequencies(options.head_dim).double().numpy()
        curves[name] = characteristic(frequencies, d)
        trained[name] = seen(plain, options.trained_length)
        shares[name] = coverage(trained[name], seen(frequencies, options.length))
        lines += table_of(name, frequencies, plain * (options.trained_length - 1))
    facts = {
        "head_dim": options.head_dim,
        "trained_length": options.trained_length,
        "length": options.length,
        "coverage": shares,
        "curves": {
            name: {"distance": d.tolist(), "real": real.tolist(), "imaginary": imaginary.tolist()}
            for name, (real, imaginary) in curves.items()
        },
    }
    print("\n".join(summary(shares, options.trained_length, options.length)))
    scalars = {
        f"curve/{kind}/{name}": dict(zip(d.astype(int).tolist(), values.tolist(), strict=True))
        for name, both in curves.items()
        for kind, values in zip(("real", "imaginary"), both, strict=True)
    }
    figures = {
        "curves": lambda path: draw_curves(d, curves, options.trained_length, path),
        "seen": lambda path: draw_seen(
            {name: trained[name] for name, one in positions.items() if one.scaling is None}, path
        ),
    }
    save(options.out, "curves", lines, facts, figures, scalars)


def summary(
    shares: Mapping[str, Mapping[str, Mapping[str, float]]], trained: int, length: int
) -> list[str]:
    """What training shows to pairs of dimensions, for people."""
    lines = [
        f"Pairs of dimensions within {trained} trained tokens, in percent: values fill [-1, 1];"
        " have both signs;",
        f"mean width of the values; share of the values at {length} tokens that training has shown",
        "",
        f"{'':<24}{'':<22}{'full':>8}{'signs':>8}{'width':>8}{'known':>8}",
    ]
    words = {"real": "real heads", "both": "with imaginary", "a": "a_n", "b": "b_n"}
    for name, found in shares.items():
        for key, share in found.items():
            heads, factor = key.split()
            values = "".join(f"{100 * value:>8.1f}" for value in share.values())
            lines.append(f"{name:<24}{words[heads] + ', ' + words[factor]:<22}{values}")
    return [*lines, ""]


def draw_curves(
    d: Floats, curves: Mapping[str, tuple[Floats, Floats]], trained: int, path: Path
) -> None:
    """Both curves over the distance; grey is the trained end."""
    with canvas(path, 15, 6.5) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        titles = (r"real: mean of $\cos f_n d$", r"imaginary: mean of $\sin f_n d$")
        for part, (panel, title) in enumerate(zip(panels, titles, strict=True)):
            for number, (name, both) in enumerate(curves.items()):
                color = COLORS[number % len(COLORS)]
                panel.plot(d[1:], both[part][1:], color=color, linewidth=2.2, label=name)
            panel.axhline(0, color="#808080", linewidth=0.8)
            panel.axvline(trained, color="#808080", linestyle="--", linewidth=1.2)
            panel.set(xscale="log", title=title, xlabel="distance (tokens)")
        panels[0].legend(loc="upper right")


def draw_seen(trained: Mapping[str, Sequence[ValueRanges]], path: Path) -> None:
    """For each theta the values that a_n and b_n were multiplied with in training, with a real head
    alone and with both kinds."""
    with canvas(path, 15, 4.6 * len(trained) + 0.6) as figure:
        grid = figure.subplots(len(trained), 2, squeeze=False, sharex=True, sharey=True)
        for line, (name, pairs) in zip(grid, trained.items(), strict=True):
            for panel, factor in zip(line, "ab", strict=True):
                for key, color, width in ((f"both {factor}", COLORS[1], 0.9),
                                          (f"real {factor}", COLORS[0], 0.45)):  # fmt: skip
                    bars = [(n, r) for n, one in enumerate(pairs) for r in one[key]]
                    bottoms = [low for _, (low, _) in bars]
                    heights = [high - low for _, (low, high) in bars]
                    panel.bar([n for n, _ in bars], heights, width, bottoms, color=color,
                              label=NAMES[key])  # fmt: skip
                panel.set(title=f"{name}, values met by ${factor}_n$", ylim=(-1.05, 1.05))
        for panel in grid[-1]:
            panel.set_xlabel("pair of dimensions $n$, fast to slow")
        for panel in grid[0]:
            panel.legend(loc="lower left", frameon=True)
