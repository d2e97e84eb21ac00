"""Folders on disk: shards, the published format's limits, and what is refused unread."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.small_models import LLAMAS, OTHERS, exported, label, saved, small, some_ids
from ropepp.checksums import CHECKSUMS
from ropepp.errors import InputError
from ropepp.interop import load_pretrained
from ropepp.interop.export import export
from ropepp.interop.saved import open_model
from ropepp.model import ModelConfig, Transformer
from ropepp.model.folders.tensors import INDEX, WHOLE, read_tensors, write_tensors
from ropepp.model.positions import (
    PI,
    ALiBi,
    FoPE,
    HeadSplit,
    ImaginaryOnly,
    NoPE,
    PartialDoubling,
    Phases,
    Position,
    Pythia,
    RoPE,
    RoPEppEC,
    RoPEppEH,
    Scaling,
    YaRN,
)

EXPRESSIBLE = [
    RoPE(),
    RoPE(theta=5e5),
    RoPEppEC(scaling=PI(8.0)),
    RoPEppEH(scaling=YaRN(32.0)),
    HeadSplit(),
    HeadSplit(interleaved=True),
    ImaginaryOnly(),
    Pythia(),
    FoPE(max_length=512, gain=0.2, theta=5e5),
    ALiBi(),
]


@pytest.mark.parametrize("position", EXPRESSIBLE, ids=label)
def test_the_published_format_and_back(position: Position, tmp_path: Path) -> None:
    model, ids = small(position, ignore_index=3), some_ids(2, 20)
    back = load_pretrained(exported(model, tmp_path / "out", "reference"))
    assert back.position == position
    assert back.ignore_index == 3
    assert torch.equal(back(ids), model(ids))


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (Phases(), "position Phases"),
        (PartialDoubling(), "position PartialDoubling"),
        (NoPE(), "position NoPE"),
        (RoPEppEC(scaling=YaRN(4.0, 2048)), "original_length=2048"),
        (RoPE(scaling=YaRN(4.0, slow=2.0)), "slow=2.0"),
        (RoPE(scaling=Scaling(2.0)), "scaling=Scaling"),
        (FoPE(scaling=PI(2.0)), "FoPE with scaling"),
        (Pythia(scaling=PI(2.0)), "partial rotation with scaling"),
        (RoPEppEC(rotary_share=0.5), "rotary_share=0.5"),
        (HeadSplit(imaginary_share=0.25), "imaginary_share=0.25"),
    ],
    ids=str,
)
def test_what_the_published_format_cannot_express(
    position: Position, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        export(saved(small(position)), tmp_path / "out", "reference")
    assert not list(tmp_path.iterdir())


def test_qk_norm_is_beyond_the_published_format(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(50, 32, 2, 4, 2, 48, qk_norm=True), RoPE())
    with pytest.raises(InputError, match="qk_norm"):
        export(saved(model), tmp_path / "out", "reference")


@pytest.mark.parametrize("form", ["ropepp", "reference"])
@pytest.mark.parametrize("position", [RoPE(), RoPEppEC(), FoPE()], ids=label)
def test_shards(position: Position, form: str, tmp_path: Path) -> None:
    model, ids = small(position), some_ids(1, 9)
    folder = exported(model, tmp_path / "out", form, shard_bytes=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert not (folder / WHOLE).exists()
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        assert sum(x.nbytes for x in load_file(file).values()) <= 20_000
    index = json.loads((folder / INDEX).read_text())
    whole = read_tensors(folder)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert torch.equal(load_pretrained(folder)(ids), model(ids))
    files[1].unlink()
    with pytest.raises(InputError, match=rf"{files[1].name} is missing"):
        load_pretrained(folder)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}
    write_tensors(tmp_path, tensors.items(), 16)
    assert [len(load_file(f)) for f in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]
    assert read_tensors(tmp_path).keys() == tensors.keys()


def change(folder: Path, name: str, **values: Any) -> None:
    """On purpose: without checksums."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"a": "../secret.safetensors"}, "names '../secret.safetensors'; allowed"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": WHOLE}, "tensor 'a' is not in"),
        (None, "has no 'weight_map'"),
    ],
)
def test_indices_that_lie(places: dict[str, str] | None, words: str, tmp_path: Path) -> None:
    folder = exported(small(RoPE()), tmp_path / "out")
    (folder / WHOLE).rename(folder / "other.safetensors")
    places = (
        {k: v.replace(WHOLE, "other.safetensors") for k, v in places.items()} if places else None
    )
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=words):
        load_pretrained(folder)


@pytest.mark.parametrize("position", [RoPE(), RoPEppEC()], ids=label)
def test_what_does_not_fit_names_the_tensor_and_both_shapes(
    position: Position, tmp_path: Path
) -> None:
    folder = exported(small(position), tmp_path / "out")
    (folder / CHECKSUMS).unlink()
    tensors = load_file(folder / WHOLE)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({**tensors, name: torch.zeros(48, 31)}, folder / WHOLE)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.*\(48, 31\).*\(48, 32\)"):
        load_pretrained(folder)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WHOLE)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight' \(48, 32\) is missing"):
        load_pretrained(folder)
    save_file({**tensors, "extra": torch.zeros(1)}, folder / WHOLE)
    with pytest.raises(InputError, match="unexpected tensor 'extra'"):
        load_pretrained(folder)
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-100])
    with pytest.raises(InputError, match="no complete safetensors"):
        load_pretrained(folder)


class Trap:
    """Unpickling one touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "touched"
    content = {"state_dict": {}, "hyper_parameters": Trap(mark)}
    checkpoint = tmp_path / "model.ckpt"
    if zipped:
        torch.save(content, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError):
        open_model(checkpoint)
    folder = exported(small(RoPE()), tmp_path / "out")
    (folder / WHOLE).unlink()
    checkpoint.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, which is never read"):
        load_pretrained(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # so it would have been


@pytest.mark.parametrize("inside", [False, True])
def test_configurations_call_nothing_but_position_encodings(inside: bool, tmp_path: Path) -> None:
    folder = exported(small(RoPEppEC()), tmp_path / "out", "ropepp")
    mark = tmp_path / "written"
    evil = {
        "class_path": "ropepp.files.write_text",
        "init_args": {"path": str(mark), "text": "here"},
    }
    good = json.loads((folder / "config.json").read_text())["position"]
    change(
        folder, "config.json", position={**good, "init_args": {"theta": evil}} if inside else evil
    )
    with pytest.raises(InputError, match=r"ropepp.files.write_text'; allowed"):
        load_pretrained(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": {"vocab_size": 50}}, "incomplete.*hidden_size"),
        ({"position": {"class_path": "ropepp.model.positions.PI", "init_args": {}}}, "no position"),
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2'; allowed: 'llama', 'mistral', 'qwen3', 'ropepp'",
        ),
    ],
)
def test_configurations_of_ours_that_do_not_fit(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = exported(small(RoPEppEC()), tmp_path / "out", "ropepp")
    change(folder, "config.json", **values)
    with pytest.raises(InputError, match=words):
        load_pretrained(folder)


def test_every_variant_is_in_these_tests() -> None:
    tried = {type(position) for position in LLAMAS + OTHERS}
    assert {type(p) for p in EXPRESSIBLE} | {Phases, PartialDoubling, NoPE} == tried
