"""A sweep's folder as a TensorBoard log directory: a table with a row for each variant, mean curves
with a band, and attention maps.

Files of its own, known by their suffix, go into the folder (columns of the table, layout), into
each run that has begun (settings, outcome) and into ``VARIANT/mean`` (curves).
"""

import json
import math
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch.utils.tensorboard.summary import custom_scalars, image, scalar

from ropepp.runs.events import EVENTS, Step, write_events
from ropepp.runs.records import METRICS, TRIAL, Run, SweepPlan, read_plan, read_runs
from ropepp.sweep.maps import FIGURES, IMAGE, write_maps

ADDRESS = "http://localhost:6006"  # where TensorBoard listens
SUFFIX = ".board"  # of this module's event files
ATTENTION_TAG = "attention/real_and_imaginary"
RUNNING_SECONDS = 600.0  # a run that has logged nothing for longer counts as stopped
BAND = {"value": 0, "lower": -1, "upper": 1}  # parts of a band, in standard deviations

Curve = dict[int, float]

# Numbers of finished runs in the table: keys of results or their evaluation, names for people.
OUTCOMES = {
    "validation_perplexity": "perplexity",
    "validation/accuracy": "accuracy",
    "parameters": "parameters",
    "kv_cache_bytes_per_token": "KV cache, bytes/token",
    "training_flops_per_token": "FLOPs/token",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "peak memory, bytes",
}


def write_boards(folder: Path) -> str:
    """Makes a sweep's folder, finished or not, a TensorBoard log directory, with attention maps of
    each variant's first finished seed; replaces what an earlier call wrote. Returns the command,
    links, and which variants have no maps and why. An `InputError` if it is no sweep's folder."""
    plan = read_plan(folder)
    runs = [run for run in read_runs(folder) if plan.has(run.spec)]
    old = list(folder.rglob(f"*tfevents*{SUFFIX}"))
    notes = []
    means: dict[str, None] = {}  # tags, in order
    for variant in dict.fromkeys(run.spec.variant for run in runs if run.done):
        done = [run for run in runs if run.done and run.spec.variant == variant]
        if reason := _draw_maps(done[0]):
            notes.append(f"no attention maps of {variant}: {reason}")
        curves = _shared([_curves(run) for run in done])
        means |= dict.fromkeys(curves)
        _write(folder / variant / "mean", [*_mean_events(curves), *_image(done[0])])
    evaluated = [key for run in runs for key in run.result.get("evaluation", {})]
    sets = [key for key in evaluated if key.endswith(("/loss", "/accuracy"))]
    others = {key: _words(key) for key in sets if not key.startswith("validation/")}
    outcomes = {plan.metric: _words(plan.metric)} | OUTCOMES | others
    hparams = _hparams(plan, runs)
    for run, settings in zip(runs, hparams, strict=True):
        if (run.directory / METRICS).exists():
            _write(run.directory, _session(run, settings, outcomes))
    _write(folder, [(0, _experiment(runs, hparams, outcomes)), (0, _layout(list(means)))])
    for file in old:
        file.unlink(missing_ok=True)
    tags = {key for run in runs for line in run.metrics() for key in line}
    return "\n".join([_how_to_open(folder, {*tags, *means}), *notes])


def _how_to_open(folder: Path, tags: Collection[str]) -> str:
    """The command; links to curves, unsmoothed in one colour a variant, bands and table."""
    wanted = ("validation/loss", "train/loss", "loss_by_position/validation")
    pins = [{"plugin": "scalars", "tag": tag} for tag in wanted if tag in tags]
    pinned = quote(json.dumps(pins, separators=(",", ":")), safe="")
    return (
        f"tensorboard --logdir {folder}\n"
        f"curves: {ADDRESS}/?runColorGroup=regex%3A(.*)%2F&smoothing=0"
        f"&pinnedCards={pinned}#timeseries\n"
        f"bands:  {ADDRESS}/#custom_scalars&_smoothingWeight=0\n"
        f"table:  {ADDRESS}/#hparams"
    )


def _words(key: str) -> str:
    return key.replace("_", " ").replace("/", " ")


def _tag(key: str) -> str:
    return f"whole_run/{key.replace('/', '_')}"


def _hparams(plan: SweepPlan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run the name of its variant and its settings; a column has one type: bool, float, or
    text where they differ. Nothing for None."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        known = {key: value for key, value in run.spec.settings.items() if value is not None}
        rows.append({"variant": plan.display.get(run.spec.variant, run.spec.variant), **known})
    for name in {key for row in rows for key in row}:
        having = [row for row in rows if name in row]
        kinds = {type(row[name]) for row in having}
        for row in having:
            if kinds <= {int, float}:
                row[name] = float(row[name])
            elif kinds != {bool} and not isinstance(row[name], str):
                row[name] = json.dumps(row[name])
    return rows


def _experiment(
    runs: Sequence[Run], hparams: Sequence[Mapping[str, Any]], outcomes: Mapping[str, str]
) -> Any:
    """The table's columns: the settings with all values that occur, and the outcomes."""
    columns = [
        summary_v2.HParam(
            name,
            summary_v2.Discrete(sorted({row[name] for row in hparams if name in row})),
            display_name=_words(name),
        )
        for name in dict.fromkeys(key for row in hparams for key in row)
    ]
    metrics = [summary_v2.Metric(_tag(key), display_name=name) for key, name in outcomes.items()]
    created = min((_times(run)[0] for run in runs), default=0.0)
    return summary_v2.hparams_config_pb(columns, metrics, time_created_secs=created)


def _session(run: Run, settings: dict[str, Any], outcomes: Iterable[str]) -> list[Step]:
    """A run's line in the table, which averages those of a variant, and its numbers there, all at
    step 0: what a resumed run tells TensorBoard to forget are later steps."""
    begin, end = _times(run)
    runs = time.time() - end < RUNNING_SECONDS
    unfinished = api_pb2.STATUS_RUNNING if runs else api_pb2.STATUS_FAILURE
    status = api_pb2.STATUS_SUCCESS if run.done else unfinished
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=end)
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    ending = summary_pb2.Summary.Value(
        tag=hparams_metadata.SESSION_END_INFO_TAG,
        metadata=hparams_metadata.create_summary_metadata(content),
        tensor=hparams_metadata.NULL_TENSOR,
    )
    known = {**run.result.get("evaluation", {}), **run.result}
    values = {key: known[key] for key in outcomes if isinstance(known.get(key), int | float)}
    # The table cannot carry what is no number.
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    scalars = [scalar(_tag(key), value) for key, value in finite.items()]
    start = summary_v2.hparams_pb(settings, trial_id=run.spec.variant, start_time_secs=begin)
    return [(0, one) for one in (start, *scalars, summary_pb2.Summary(value=[ending]))]


def _times(run: Run) -> tuple[float, float]:
    """When a run began and ended or was last heard of, in seconds since 1970."""
    heard = next(f for f in (run.directory / METRICS, run.directory / TRIAL) if f.exists())
    end = heard.stat().st_mtime
    if "finished" in run.result:
        end = datetime.fromisoformat(run.result["finished"]).timestamp()
    if "seconds" in run.result:
        return end - float(run.result["seconds"]), end
    return min((run.directory / TRIAL).stat().st_mtime, end), end


def _curves(run: Run) -> dict[str, Curve]:
    """Losses and accuracies of a run by step, and its loss by position."""
    curves: dict[str, Curve] = {}
    for line in run.metrics():
        for tag, value in line.items():
            evaluated = tag.startswith("validation") and tag.endswith(("/loss", "/accuracy"))
            if tag == "train/loss" or evaluated:
                curves.setdefault(tag, {})[line["step"]] = value
    for name, found in run.result.get("loss_by_position", {}).items():
        losses = (math.nan if loss is None else loss for loss in found["loss"])
        points = zip(map(round, found["position"]), losses, strict=True)
        curves[f"loss_by_position/validation{name}"] = dict(points)
    return curves


def _shared(seeds: Sequence[Mapping[str, Curve]]) -> dict[str, dict[int, list[float]]]:
    """Values of all seeds at the steps that all of them have, by tag; no tag without any."""
    found = {}
    for tag in seeds[0]:
        curves = [seed.get(tag, {}) for seed in seeds]
        steps = sorted(set.intersection(*map(set, curves)))
        if steps:
            found[tag] = {step: [curve[step] for curve in curves] for step in steps}
    return found


def _mean_events(curves: Mapping[str, Mapping[int, list[float]]]) -> Iterator[Step]:
    """Means under the runs' own tags; of two seeds and more the band too, with the mean in it: a
    tag that single runs have as well would make its chart complain about them."""
    for tag, points in curves.items():
        for step, values in points.items():
            mean = statistics.fmean(values)
            yield step, scalar(tag, mean)
            if len(values) > 1:
                spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
                for part, sign in BAND.items():
                    yield step, scalar(f"variation/{tag}/{part}", mean + sign * spread)


def _layout(means: Sequence[str]) -> Any:
    """The custom scalars' tab: means with their band."""
    charts = {
        tag: ["Margin", [f"variation/{tag}/{part}" for part in BAND]]
        for tag in reversed(means)  # TensorBoard shows these charts last first
    }
    title = "Mean over seeds, with one standard deviation"
    return custom_scalars({title: charts} if charts else {})


def _draw_maps(run: Run) -> str | None:
    """Draws a run's maps unless they are newer than its checkpoints; returns why there are none."""
    figures = run.directory / FIGURES
    written = [path.stat().st_mtime for path in (run.directory / "checkpoints").glob("step-*")]
    if figures.exists() and figures.stat().st_mtime > max(written, default=0.0):
        return None
    return write_maps(run)


def _image(run: Run) -> list[Step]:
    file = run.directory / IMAGE
    if not file.exists():
        return []
    from matplotlib.image import imread

    drawn = image(ATTENTION_TAG, imread(file), dataformats="HWC")
    return [(int(run.result.get("steps", 0)), drawn)]


def _write(directory: Path, summaries: Iterable[Step]) -> None:
    """Writes an event file whose name comes before those of a run's own files: TensorBoard reads
    them in order, and would take no more from those of a run that goes on."""
    write_events(directory / f"{EVENTS}0000000000.{time.time_ns()}{SUFFIX}", summaries)
