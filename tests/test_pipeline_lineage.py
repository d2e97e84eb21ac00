"""Pipelines: what a stage was begun with, and from what; what is refused before training."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ropepp import pipeline
from ropepp.errors import InputError, Preempted
from ropepp.pipeline import load, run
from ropepp.runs import process
from ropepp.runs.archives import write_archive

# Stands for a fit: leaves a checkpoint and, unless it is the run to stop at, a result.
FIT = """
import json, shutil, sys
from pathlib import Path
here = Path(__file__).parent
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
folder = Path(given["logs"], given["experiment"], given["run"])
steps = int(given["trainer.max_steps"])
(folder / "checkpoints").mkdir(exist_ok=True)
shutil.copy(here / "x.ckpt", folder / "checkpoints" / f"step-{steps:07d}.ckpt")
if given["run"] == (here / "stop").read_text():
    sys.exit(75)
loss = float(given.get("model.optimizer.lr", 0))
(folder / "result.json").write_text(
    json.dumps({"steps": steps, "train_loss": loss, "validation_loss": 1.0})
)
"""
BASE: dict[str, Any] = {
    "model": {
        "network": {
            "vocab_size": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 2, "ffn_size": 16,
        },
        "optimizer": {"class_path": "AdamW"},
    },
    "data": {
        "class_path": "RecallDataModule",
        "init_args": {
            "sequence_length": 16, "pairs": 2, "vocab_size": 16, "global_batch_size": 4,
            "micro_batch_size": 4,
        },
    },
    "trainer": {"accelerator": "cpu", "devices": 1},
}  # fmt: skip
PRE = {"name": "pre", "set": {"trainer.max_steps": 6}}
DECAY = {"name": "decay", "after": "pre", "take": "everything", "set": {"trainer.max_steps": 8}}
LONG = {"name": "long", "after": "decay", "set": {"trainer.max_steps": 4}}


class Tried:
    """A pipeline whose fits are `FIT`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.logs = folder, capsys, folder / "logs"
        write_archive({"global_step": 0}, folder / "x.ckpt")
        (folder / "fit.py").write_text(FIT)
        (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
        self.stop_at("")

    def stop_at(self, name: str) -> None:
        (self.folder / "stop").write_text(name)

    def stage(self, name: str) -> Path:
        return self.logs / "p" / "v" / name

    def run(self, *stages: dict[str, Any], **other: Any) -> str:
        """What it prints."""
        content = {
            "name": "p", "base": ["base.yaml"], "logs": str(self.logs), "stages": list(stages),
            "variants": {"v": {"model.position": {"class_path": "RoPE"}}},
            "launcher": f"{{python}} -S {self.folder / 'fit.py'} {{args}}",
        }  # fmt: skip
        file = self.folder / "p.yaml"
        file.write_text(yaml.safe_dump(content | other))
        self.capsys.readouterr()
        run(load(file), ["v"])
        return self.capsys.readouterr().out


@pytest.fixture
def tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Tried:
    monkeypatch.setattr(process, "POLL", 0.02)
    return Tried(tmp_path, capsys)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of parsing what is right."""
    monkeypatch.setattr(pipeline, "check", lambda *_: None)


def with_keys(stage: dict[str, Any], **keys: Any) -> dict[str, Any]:
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return {**stage, "set": {**stage["set"], **named}}


DONE = "v/pre: done before\nv/decay: done before\nv/long: done before\n"


@pytest.mark.usefixtures("unchecked")
def test_what_comes_of_another_parent_is_told(tried: Tried) -> None:
    """Of the next stage and of those after it; not if the whole folder is another place."""
    tried.run(PRE, DECAY, LONG)
    assert tried.run(PRE, DECAY, LONG) == DONE
    tried.logs = tried.logs.rename(tried.folder / "moved")
    assert tried.run(PRE, DECAY, LONG) == DONE

    shutil.rmtree(tried.stage("pre"))
    assert "done before, " not in tried.run(PRE, DECAY, LONG)  # the same has come of it
    shutil.rmtree(tried.stage("pre"))
    other = with_keys(PRE, model__optimizer__lr=0.5)
    _, _, decay, long = tried.run(other, DECAY, LONG).splitlines()
    words = "parents.pre.train_loss was 0.0 and is 0.5"
    for name, line in (("decay", decay), ("long", long)):
        assert line == (
            f"v/{name}: done before, with other settings or parents ({words}); to run it anew, "
            f"delete {tried.stage(name)}"
        )

    (tried.stage("long") / "result.json").unlink()
    before = (tried.stage("long") / "asked.json").read_bytes()
    with pytest.raises(InputError, match=r"v/long was begun with other .*parents\.pre\.train_loss"):
        tried.run(other, DECAY, LONG)
    assert (tried.stage("long") / "asked.json").read_bytes() == before
    shutil.rmtree(tried.stage("long"))
    assert "v/long: begins" in tried.run(other, DECAY, LONG)


@pytest.mark.usefixtures("unchecked")
def test_a_stage_between_is_told_to_those_after_it(tried: Tried) -> None:
    tried.run(PRE, DECAY, LONG)
    middle = {"name": "mid", "after": "pre", "set": {"trainer.max_steps": 7}}
    out = tried.run(PRE, middle, {**DECAY, "after": "mid"}, LONG).splitlines()
    assert [line for line in out if "v/mid: begins" in line]
    assert 'stage.after was "pre" and is "mid"' in out[-2]
    assert out[-1].startswith("v/long: done before, with other")
    assert "parents.mid was null and is {" in out[-1]


@pytest.mark.usefixtures("unchecked")
def test_a_stage_that_has_begun_keeps_its_settings(tried: Tried) -> None:
    tried.stop_at("v/decay")
    with pytest.raises(Preempted):
        tried.run(PRE, DECAY)
    asked = tried.stage("decay") / "asked.json"
    before = asked.read_bytes()
    edited = with_keys(DECAY, model__optimizer__lr=0.5)
    words = r"v/decay was begun with other settings .*lr was null and is 0\.5\): choose another"
    with pytest.raises(InputError, match=words):
        tried.run(PRE, edited)
    with pytest.raises(InputError, match=r"seed was 0 and is 1\): choose another name, or delete"):
        tried.run(PRE, DECAY, seed=1)
    assert asked.read_bytes() == before

    shutil.rmtree(tried.stage("decay") / "checkpoints")
    with (tried.stage("decay") / "fit.log").open("ab") as log:  # as a process of it does
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=words):
            tried.run(PRE, edited)
    tried.stop_at("")
    assert "v/decay: begins" in tried.run(PRE, edited)  # it had nothing to lose
    assert json.loads(asked.read_text())["stage"]["set"]["model.optimizer.lr"] == 0.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("content", [None, b"{"])
@pytest.mark.filterwarnings("ignore:.*asked.json is damaged")
def test_settings_that_cannot_be_compared(tried: Tried, content: bytes | None) -> None:
    tried.stop_at("v/decay")
    with pytest.raises(Preempted):
        tried.run(PRE, DECAY)
    tried.stop_at("")
    for name in ("pre", "decay"):
        asked = tried.stage(name) / "asked.json"
        asked.unlink() if content is None else asked.write_bytes(content)
    unknown = "with unknown settings or parents (asked.json is missing or damaged)"
    out = tried.run(PRE, DECAY)
    assert f"v/pre: done before, {unknown}; to run it anew, delete" in out
    assert f"v/decay was begun {unknown}\n" in out
    assert f"v/decay: done before, {unknown}" in tried.run(PRE, DECAY)  # nobody has made one up


@pytest.mark.usefixtures("unchecked")
def test_a_stage_begins_with_the_last_checkpoint_alone(tried: Tried) -> None:
    tried.run(PRE)
    saved = tried.stage("pre") / "checkpoints"
    (saved / "step-0000006.ckpt").rename(saved / "step-0000004.ckpt")
    with pytest.raises(InputError, match=r"of step 6; the newest .* is .*step-0000004\.ckpt: "):
        tried.run(PRE, DECAY)
    shutil.rmtree(saved)
    with pytest.raises(InputError, match=r"decay begins with the last .* of pre, .* is none: "):
        tried.run(PRE, DECAY)
    assert not (tried.stage("decay") / "fit.log").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([PRE, DECAY, with_keys(LONG, model__optimizer__lrr=1)], r"stages\.long \(v\): .*lrr"),
        ([PRE, with_keys(DECAY, model__optimizer__lr="fast")], r"stages\.decay \(v\): .*fast"),
        ([PRE, with_keys(DECAY, model__z_loss=-1)], r"stages\.decay \(v\): .*z_loss is -1"),
        (
            [PRE, with_keys(DECAY, trainer__max_steps=6)],
            r"stages\.decay \(v\): trainer\.max_steps is 6; allowed: more than 6, at which pre",
        ),
    ],
)
def test_bad_stages_are_refused_before_the_first_trains(
    tried: Tried, stages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=f"p.yaml: {message}"):
        tried.run(*stages)
    assert not tried.logs.exists()
    assert "v/pre: begins" in tried.run(PRE)
    with pytest.raises(InputError, match=message):  # after what is done as well
        tried.run(*stages)
