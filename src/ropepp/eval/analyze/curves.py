"""``ropepp analyze curves``: how real and imaginary heads weigh distance, and what training shows
them; see `ropepp.eval.curves`."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropepp.errors import InputError
from ropepp.eval.analyze.output import COLORS, canvas, require_extras, save
from ropepp.eval.curves import Seen, characteristic, coverage, limit, rows, seen
from ropepp.model.positions import PI, RoPE, Scaling, YaRN

Floats = NDArray[np.float64]
POINTS = 400  # of a curve
NAMES = {
    "real a": "RoPE, $a_n$: cos",
    "both a": "RoPE++, $a_n$: cos and sin",
    "real b": "RoPE, $b_n$: sin",
    "both b": "RoPE++, $b_n$: sin and $-$cos",
}


def settings(options: Namespace) -> dict[str, RoPE]:
    """The positions to look at by name: each theta as it is, and the first one with each scaling.

    Raises:
        InputError: A scaling is not of the form PI:8 or YaRN:32, or a theta not above 1.
    """
    found = {}
    for theta in options.theta:
        if not theta > 1:
            raise InputError(f"--theta is {theta}; it must be above 1")
        found[f"theta {theta:g}"] = RoPE(theta)
    for text in options.scaling:
        name, _, factor = text.partition(":")
        scaling: Scaling
        try:
            if name == "PI":
                scaling = PI(float(factor))
            elif name == "YaRN":
                scaling = YaRN(float(factor), original_length=options.trained_length)
            else:
                raise InputError(f"--scaling is {text!r}; allowed: PI:FACTOR, YaRN:FACTOR")
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--scaling is {text!r}; {factor!r} is no number") from error
        found[f"theta {options.theta[0]:g}, {name} {float(factor):g}"] = RoPE(
            options.theta[0], scaling=scaling
        )
    return found


def distances(length: int) -> Floats:
    """0 and about `POINTS` distances below ``length``, in steps of about equal ratio."""
    steps = np.geomspace(1, max(1, length - 1), POINTS).round()
    return np.unique(np.concatenate([[0.0], steps]))


def analyze(options: Namespace) -> None:
    """The command; see ``ropepp analyze curves --help``."""
    require_extras()
    if not 2 <= options.trained_length <= options.length:
        raise InputError(
            f"--trained_length is {options.trained_length} and --length {options.length}; allowed"
            " are lengths from 2 on, the trained one not above the other"
        )
    d, curves, trained, shares = distances(options.length), {}, {}, {}
    lines = []
    for name, position in settings(options).items():
        frequencies = position.frequencies(options.head_dim).double().numpy()
        plain = RoPE(position.theta).frequencies(options.head_dim).double().numpy()
        curves[name] = characteristic(frequencies, d)
        trained[name] = seen(plain, options.trained_length)
        shares[name] = coverage(trained[name], seen(frequencies, options.length))
        lines += rows(name, frequencies, trained[name])
    limits = {f"theta {theta:g}": limit(theta, d[1:]) for theta in options.theta}
    facts = {
        "head_dim": options.head_dim,
        "trained_length": options.trained_length,
        "length": options.length,
        "coverage": shares,
        "curves": {
            name: {"distance": d.tolist(), "real": re.tolist(), "imaginary": im.tolist()}
            for name, (re, im) in curves.items()
        },
    }
    print("\n".join(summary(shares, options.trained_length, options.length)))
    scalars = {
        f"curve/{kind}/{name}": dict(zip(d.astype(int).tolist(), values.tolist(), strict=True))
        for name, both in curves.items()
        for kind, values in zip(("real", "imaginary"), both, strict=True)
    }
    plain_names = list(limits)
    figures = {
        "curves": lambda path: draw_curves(d, curves, limits, options.trained_length, path),
        "seen": lambda path: draw_seen({n: trained[n] for n in plain_names}, path),
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
    d: Floats,
    curves: Mapping[str, tuple[Floats, Floats]],
    limits: Mapping[str, tuple[Floats, Floats]],
    trained: int,
    path: Path,
) -> None:
    """Both curves over the distance; dotted the limit for many dimensions, grey the trained end."""
    with canvas(path, 15, 6.5) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        titles = (r"real: mean of $\cos f_n d$", r"imaginary: mean of $\sin f_n d$")
        for part, (panel, title) in enumerate(zip(panels, titles, strict=True)):
            for number, (name, both) in enumerate(curves.items()):
                color = COLORS[number % len(COLORS)]
                panel.plot(d[1:], both[part][1:], color=color, linewidth=2.2, label=name)
                if name in limits:
                    panel.plot(d[1:], limits[name][part], color=color, linestyle=":", linewidth=3)
            panel.axhline(0, color="#808080", linewidth=0.8)
            panel.axvline(trained, color="#808080", linestyle="--", linewidth=1.2)
            panel.set_xscale("log")
            panel.set_title(title)
            panel.set_xlabel("distance (tokens)")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].legend(loc="upper right")


def draw_seen(trained: Mapping[str, Sequence[Seen]], path: Path) -> None:
    """For each theta the values that a_n and b_n were multiplied with in training, with a real head
    alone and with both kinds."""
    with canvas(path, 15, 4.6 * len(trained) + 0.6) as figure:
        grid = figure.subplots(len(trained), 2, squeeze=False, sharex=True, sharey=True)
        for line, (name, pairs) in zip(grid, trained.items(), strict=True):
            for panel, factor in zip(line, "ab", strict=True):
                for key, color, width in ((f"both {factor}", COLORS[1], 0.9),
                                          (f"real {factor}", COLORS[0], 0.45)):  # fmt: skip
                    bars = [(n, r) for n, one in enumerate(pairs) for r in one.values()[key]]
                    bottoms = [low for _, (low, _) in bars]
                    heights = [high - low for _, (low, high) in bars]
                    panel.bar([n for n, _ in bars], heights, width, bottoms, color=color,
                              label=NAMES[key])  # fmt: skip
                panel.set_title(f"{name}, values met by ${factor}_n$")
                panel.set_ylim(-1.05, 1.05)
                panel.spines[["top", "right"]].set_visible(False)
        for panel in grid[-1]:
            panel.set_xlabel("pair of dimensions $n$, fast to slow")
        for panel in grid[0]:
            panel.legend(loc="lower left", frameon=True)
