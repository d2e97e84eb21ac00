"""What TensorBoard's own backends make of a sweep's folder."""

import json
import math
import os
import statistics
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment
from tensorboard.plugins.hparams.list_session_groups import Handler

from helpers.sweep_files import write_plan, write_spec
from ropepp.errors import InputError
from ropepp.runs.records import RunSpec, SweepPlan
from ropepp.sweep.boards import write_boards

STEPS = range(10, 101, 10)
SETTINGS = {
    "rope": {"theta": 10000, "scaling": None, "shared": True, "phases": [0.0]},
    "ec": {"theta": 10000.0, "scaling": "PI", "shared": False, "phases": [0.0, -90.0]},
    "eh": {"theta": 5e5, "scaling": None, "shared": True, "phases": "half"},
}


def loss(variant: str, seed: int, step: int) -> float:
    return 4 * math.exp(-step / 50) + len(variant) / 10 + seed / 100 + (step % 20) * seed / 1000


def result(variant: str, seed: int) -> dict[str, Any]:
    last = loss(variant, seed, STEPS[-1]) + 0.1
    return {
        "steps": 100,
        "parameters": 1000 + len(variant),
        "kv_cache_bytes_per_token": 64,
        "training_flops_per_token": 1.5e6,
        "validation_loss": last,
        "validation_perplexity": math.exp(last),
        "evaluation": {
            "validation/loss": last,
            "validation/accuracy": 0.5 + seed / 10,
            "validation_2x/loss": last + 1,
        },
        "loss_by_position": {
            "": {"position": [0.0, 1.0, 2.6], "loss": [3.0 + seed, 2.0, 1.0], "count": [1, 1, 2]},
            "_2x": {"position": [0.0], "loss": [5.0], "count": [1]},
        },
        "tokens_per_second": 1e5,
        "peak_memory_bytes": 2_000_000,
        "seconds": 30.0,
        "finished": "2026-01-02T03:04:05Z",
    }


def make(folder: Path, variant: str, seed: int, last: int = 100) -> Path:
    """A run up to a step, finished if it is the last."""
    spec = RunSpec(variant, seed, {}, SETTINGS[variant])
    run = folder / spec.run
    write_spec(run, spec)
    lines = []
    for step in STEPS[: last // 10]:
        value = loss(variant, seed, step)
        lines.append({"step": step, "train/loss": value, "utilisation/tokens_per_second": 1.0})
        if step % 50 == 0:
            lines.append({"step": step, "validation/loss": value, "validation_2x/loss": value + 1})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "events.out.tfevents.1700000000.host.1.0").write_bytes(b"")
    if last == 100:
        (run / "result.json").write_text(json.dumps(result(variant, seed)))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds and more of three variants; one run is under way, one stopped long ago, one has
    not begun."""
    folder = tmp_path / "demo"
    plan = SweepPlan("demo", "?", "rope", variants=list(SETTINGS), display={"ec": "RoPE++ EC"})
    write_plan(folder, plan)
    for variant in SETTINGS:
        for seed in range(2):
            make(folder, variant, seed)
    make(folder, "rope", 2)
    make(folder, "ec", 2, last=50)
    stopped = make(folder, "eh", 2, last=30)
    old = time.time() - 7200
    for file in stopped.iterdir():
        os.utime(file, (old, old))
    write_spec(folder / "ec/seed-3", RunSpec("ec", 3, {}, SETTINGS["ec"]))
    return folder


def load(folder: Path) -> EventMultiplexer:
    return EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()


def hparams(folder: Path) -> tuple[api_pb2.Experiment, dict[str, api_pb2.SessionGroup]]:
    """The HParams tab's columns, and its lines by name."""
    multiplexer = load(folder)
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider, multiplexer=multiplexer))
    statuses = [
        api_pb2.STATUS_UNKNOWN,
        api_pb2.STATUS_SUCCESS,
        api_pb2.STATUS_FAILURE,
        api_pb2.STATUS_RUNNING,
    ]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=100,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=statuses,
    )
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    asked = api_pb2.GetExperimentRequest()
    experiment = get_experiment.Handler(RequestContext(), context, "", asked).run()
    return experiment, {group.name: group for group in groups}


def metrics_of(group: api_pb2.SessionGroup) -> dict[str, float]:
    return {value.name.tag.removeprefix("whole_run/"): value.value for value in group.metric_values}


def scalars(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / run), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_row_a_variant_with_means_over_seeds(folder: Path) -> None:
    write_boards(folder)
    experiment, groups = hparams(folder)
    assert set(groups) == set(SETTINGS)
    names = [info.display_name for info in experiment.metric_infos]
    assert names[:3] == ["validation loss", "perplexity", "accuracy"]
    assert "validation 2x loss" in names
    for variant, seeds in (("rope", range(3)), ("ec", range(2)), ("eh", range(2))):
        found = metrics_of(groups[variant])
        results = [result(variant, seed) for seed in seeds]
        mean = statistics.mean(one["validation_loss"] for one in results)
        assert found["validation_loss"] == pytest.approx(mean, rel=1e-6)
        assert found["validation_accuracy"] == pytest.approx(0.5 + statistics.mean(seeds) / 10)
        assert found["validation_2x_loss"] == pytest.approx(mean + 1, rel=1e-6)
        assert found["parameters"] == 1000 + len(variant)
        assert found["kv_cache_bytes_per_token"] == 64
        assert found["training_flops_per_token"] == 1.5e6
        assert found["tokens_per_second"] == 1e5
        assert found["peak_memory_bytes"] == 2e6


def test_the_settings_are_columns_of_one_type(folder: Path) -> None:
    write_boards(folder)
    experiment, groups = hparams(folder)
    columns = {info.name: info for info in experiment.hparam_infos}
    assert set(columns) == {"variant", "theta", "scaling", "shared", "phases"}
    domains = {
        name: [getattr(value, value.WhichOneof("kind")) for value in info.domain_discrete.values]
        for name, info in columns.items()
    }
    assert domains == {
        "variant": ["RoPE++ EC", "eh", "rope"],
        "theta": [10000.0, 5e5],
        "scaling": ["PI"],
        "shared": [False, True],
        "phases": ["[0.0, -90.0]", "[0.0]", "half"],
    }
    assert columns["theta"].type == api_pb2.DATA_TYPE_FLOAT64
    assert columns["shared"].type == api_pb2.DATA_TYPE_BOOL
    ec = groups["ec"].hparams
    assert ec["variant"].string_value == "RoPE++ EC"
    assert ec["theta"].number_value == 10000
    assert ec["phases"].string_value == "[0.0, -90.0]"
    assert "scaling" not in groups["rope"].hparams


def test_status_and_times(folder: Path) -> None:
    write_boards(folder)
    _, groups = hparams(folder)
    sessions = {session.name: session for group in groups.values() for session in group.sessions}
    assert "ec/seed-3" not in sessions  # has not begun, and an empty folder says so best
    assert [path.name for path in (folder / "ec/seed-3").iterdir()] == ["trial.json"]
    assert sessions["ec/seed-2"].status == api_pb2.STATUS_RUNNING
    assert sessions["eh/seed-2"].status == api_pb2.STATUS_FAILURE
    done = [name for name, one in sessions.items() if one.status == api_pb2.STATUS_SUCCESS]
    assert len(done) == 7
    assert not sessions["ec/seed-2"].metric_values
    one = sessions["rope/seed-0"]
    assert one.end_time_secs == 1767323045
    assert one.end_time_secs - one.start_time_secs == 30
    assert abs(sessions["eh/seed-2"].end_time_secs - (time.time() - 7200)) < 60


def test_mean_curves_and_bands(folder: Path) -> None:
    write_boards(folder)
    found = scalars(folder, "rope/mean")
    curves = np.array([[loss("rope", seed, step) for step in STEPS] for seed in range(3)])
    mean, sd = curves.mean(0), curves.std(0, ddof=1)
    for tag, want in (
        ("train/loss", mean),
        ("variation/train/loss/value", mean),
        ("variation/train/loss/lower", mean - sd),
        ("variation/train/loss/upper", mean + sd),
    ):
        assert [step for step, _ in found[tag]] == list(STEPS)
        np.testing.assert_allclose([value for _, value in found[tag]], want, rtol=1e-6)
    at_50, at_100 = curves[:, 4].mean(), curves[:, 9].mean()
    assert found["validation/loss"] == [(50, pytest.approx(at_50)), (100, pytest.approx(at_100))]
    assert found["validation_2x/loss"][1] == (100, pytest.approx(at_100 + 1))
    assert found["loss_by_position/validation"] == [(0, 4.0), (1, 2.0), (3, 1.0)]
    assert found["variation/loss_by_position/validation/upper"][0] == (0, 5.0)
    assert found["loss_by_position/validation_2x"] == [(0, 5.0)]


def test_means_are_at_the_steps_that_all_finished_seeds_share(folder: Path) -> None:
    file = folder / "ec/seed-1/metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] != 20]
    file.write_text("\n".join(line for line in lines if "validation" not in line) + "\n")
    write_boards(folder)
    found = scalars(folder, "ec/mean")
    assert [step for step, _ in found["train/loss"]] == [10, *STEPS[2:]]
    want = (loss("ec", 0, 30) + loss("ec", 1, 30)) / 2  # the unfinished third seed is not in it
    assert dict(found["train/loss"])[30] == pytest.approx(want)
    assert "validation/loss" not in found


def test_one_seed_has_no_band(folder: Path) -> None:
    (folder / "ec/seed-1/result.json").unlink()
    write_boards(folder)
    found = scalars(folder, "ec/mean")
    assert found["train/loss"][0] == (10, pytest.approx(loss("ec", 0, 10)))
    assert not any(tag.startswith("variation") for tag in found)


def test_a_diverged_run(folder: Path) -> None:
    content = result("eh", 0) | {"validation_loss": math.nan}
    (folder / "eh/seed-0/result.json").write_text(json.dumps(content))
    file = folder / "eh/seed-0/metrics.jsonl"
    file.write_text(file.read_text() + json.dumps({"step": 100, "train/loss": math.nan}) + "\n")
    write_boards(folder)
    _, groups = hparams(folder)
    assert metrics_of(groups["eh"])["validation_loss"] == pytest.approx(
        result("eh", 1)["validation_loss"]
    )
    found = scalars(folder, "eh/mean")
    assert math.isnan(found["train/loss"][-1][1])
    assert math.isnan(found["variation/train/loss/upper"][-1][1])
    assert not math.isnan(found["train/loss"][-2][1])


def test_the_layout(folder: Path) -> None:
    write_boards(folder)
    (event,) = load(folder).Tensors(".", "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (means,) = layout.category
    assert {chart.title for chart in means.chart} == {
        *("train/loss", "validation/loss", "validation_2x/loss"),
        *("loss_by_position/validation", "loss_by_position/validation_2x"),
    }
    tags = set(scalars(folder, "rope/mean"))
    for chart in means.chart:
        (series,) = chart.margin.series
        assert {series.value, series.lower, series.upper} <= tags


def test_a_second_call_replaces_what_the_first_wrote(folder: Path) -> None:
    write_boards(folder)
    before = [path for path in folder.rglob("*") if path.is_file()]
    first = scalars(folder, "ec/mean")
    make(folder, "ec", 2)
    write_boards(folder)
    after = [path for path in folder.rglob("*") if path.is_file()]
    assert len(after) == len(before) + 1  # result.json
    kept = set(before) & set(after)
    assert {path for path in before if path.suffix != ".board"} == kept
    second = scalars(folder, "ec/mean")
    assert {tag: len(points) for tag, points in second.items()} == {
        tag: len(points) for tag, points in first.items()
    }
    mean = statistics.mean(loss("ec", seed, 100) for seed in range(3))
    assert second["train/loss"][-1] == (100, pytest.approx(mean))
    _, groups = hparams(folder)
    assert len(groups) == 3
    assert len(groups["ec"].sessions) == 3
    found = metrics_of(groups["ec"])["validation_accuracy"]
    assert found == pytest.approx(0.6)


def test_the_runs_own_events_come_last_and_stay(folder: Path) -> None:
    write_boards(folder)
    names = sorted(path.name for path in (folder / "rope/seed-0").glob("*tfevents*"))
    assert len(names) == 2
    assert names[0].endswith(".board")
    assert names[1] == "events.out.tfevents.1700000000.host.1.0"


def test_the_text(folder: Path) -> None:
    text = write_boards(folder)
    assert text.startswith(f"tensorboard --logdir {folder}\n")
    assert "/?runColorGroup=regex%3A(.*)%2F&smoothing=0" in text
    assert "%22validation%2Floss%22" in text
    assert text.count("no attention maps") == len(SETTINGS)


def test_a_sweep_without_a_finished_run(tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    write_plan(folder, SweepPlan("fresh", "?", "rope", variants=["rope"]))
    write_boards(folder)
    make(folder, "rope", 0, last=40)
    write_boards(folder)
    assert not (folder / "rope/mean").exists()
    _, groups = hparams(folder)
    assert [session.name for session in groups["rope"].sessions] == ["rope/seed-0"]


def test_the_metric_of_an_evaluation(folder: Path) -> None:
    plan = SweepPlan(
        "demo", "?", "rope", metric="validation_2x/loss", variants=["rope", "ec", "eh"]
    )
    (folder / "sweep.json").write_text(json.dumps(asdict(plan)))
    write_boards(folder)
    experiment, groups = hparams(folder)
    assert experiment.metric_infos[0].display_name == "validation 2x loss"
    want = statistics.mean(result("eh", seed)["validation_loss"] + 1 for seed in range(2))
    assert metrics_of(groups["eh"])["validation_2x_loss"] == pytest.approx(want, rel=1e-6)


def test_what_the_plan_no_longer_asks_for_is_left_out(folder: Path) -> None:
    write_boards(folder)
    write_plan(folder, SweepPlan("demo", "?", "rope", variants=["rope", "ec"], seeds=[0, 1]))
    write_boards(folder)
    _, groups = hparams(folder)
    assert set(groups) == {"rope", "ec"}
    assert [session.name for session in groups["rope"].sessions] == ["rope/seed-0", "rope/seed-1"]
    assert not list((folder / "eh/mean").iterdir())


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sweep\.json is missing"):
        write_boards(tmp_path)


def test_maps_of_the_first_finished_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once, anew after a newer checkpoint, and shown with the means."""
    drawn: list[str] = []
    pixels = np.random.default_rng(0).random((5, 7, 3))

    def fake(run: Any) -> str | None:
        if run.spec.variant == "eh":
            return "it has no complete checkpoint"
        drawn.append(run.spec.run)
        imsave(run.directory / "attention.png", pixels)
        (run.directory / "attention.json").write_text("{}")
        return None

    monkeypatch.setattr("ropepp.sweep.boards.write_maps", fake)
    (folder / "rope/seed-0/result.json").unlink()
    text = write_boards(folder)
    assert drawn == ["rope/seed-1", "ec/seed-0"]
    assert text.endswith("\nno attention maps of eh: it has no complete checkpoint")
    (image,) = load(folder).Tensors("rope/mean", "attention/real_and_imaginary")
    assert image.step == 100
    width, height, png = image.tensor_proto.string_val
    assert (width, height) == (b"7", b"5")
    np.testing.assert_allclose(imread(BytesIO(png))[..., :3], pixels, atol=1 / 255)
    write_boards(folder)
    assert len(drawn) == 2
    checkpoint = folder / "ec/seed-0/checkpoints/step-0000100.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"")
    os.utime(checkpoint, (time.time() + 5, time.time() + 5))
    write_boards(folder)
    assert drawn[2:] == ["ec/seed-0"]
