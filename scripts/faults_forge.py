"""Forges files that would run a command if they were trusted; see faults_hostile.

    python scripts/faults_forge.py WORLD    makes WORLD/hostile

The command is always ``touch $FAULTS_CANARY``.
"""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

COMMAND = "touch $FAULTS_CANARY"
LAST = "checkpoints/step-0000006.ckpt"


class Payload:
    """Unpickled, it runs the command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)


def dotted(module: str, name: str, argument: str = COMMAND) -> bytes:
    """A pickle that calls ``module.name``, where the name may have dots."""

    def text(one: str) -> bytes:
        return b"\x8c" + bytes([len(one)]) + one.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


PICKLES = {
    "reduce": pickle.dumps(Payload()),
    "dotted": dotted("torch.distributed.checkpoint.metadata", "os.system"),
    "eval": dotted("builtins", "eval", f"__import__('os').system('{COMMAND}')"),
    "prefix": dotted("torch.serialization", "os.system"),
    "hidden": pickle.dumps({"state_dict": {}, "global_step": Payload()}, protocol=2),
}


def archive(file: Path, content: bytes, like: Path | None = None) -> None:
    """A file of `torch.save` whose pickle is ``content``."""
    with zipfile.ZipFile(file, "w") as new:
        if like is not None:
            with zipfile.ZipFile(like) as old:
                for name in old.namelist():
                    is_pickle = name.endswith("/data.pkl")
                    new.writestr(name, content if is_pickle else old.read(name))
        else:
            new.writestr("archive/data.pkl", content)
            new.writestr("archive/byteorder", "little")
            new.writestr("archive/version", "3\n")


def main(world: Path) -> None:
    """Makes everything."""
    place = world / "hostile"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    one, shards = world / "logs/t/a" / LAST, world / "logs/t/sharded" / LAST
    for name, content in PICKLES.items():
        (place / f"raw-{name}.ckpt").write_bytes(content)
        archive(place / f"archive-{name}.ckpt", content)
        archive(place / f"within-{name}.ckpt", content, like=one)
        for part in (".metadata", "meta.pt"):
            folder = place / f"shards-{part.strip('.')}-{name}.ckpt"
            shutil.copytree(shards, folder)
            if part == "meta.pt":
                archive(folder / part, content)
            else:
                (folder / part).write_bytes(content)
        for file in ("model.safetensors", "pytorch_model.bin", "tokenizer.json"):
            folder = place / f"folder-{file.replace('.', '-')}-{name}"
            shutil.copytree(world / "hf", folder)
            (folder / file).write_bytes(content)
            if file == "pytorch_model.bin":
                (folder / "model.safetensors").unlink()
    bytes_entry(shards, place / "shards-bytes.ckpt")
    settings(one, place)
    many = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01](" + b"]" * 20_000_000 + b"es."
    archive(place / "lists.ckpt", many)
    folder = place / "auto_map"
    shutil.copytree(world / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.system({COMMAND!r})\n")
    sizes(world, place)
    import numpy as np

    for folder in place.iterdir():
        renew_checksums(folder)
    array = np.array([Payload()], dtype=object)
    np.save(place / "objects.npy", array, allow_pickle=True)


def renew_checksums(folder: Path) -> None:
    """Whoever forges a file forges its checksum too."""
    file = folder / "checksums.json"
    if file.is_file():
        from ropepp import checksums

        known = json.loads(file.read_text())["crc32"]
        checksums.write_checksums(folder, [name for name in known if (folder / name).is_file()])


def bytes_entry(source: Path, target: Path) -> None:
    """A sharded checkpoint whose entries of bytes, or one that is added, hold a payload."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    shutil.copytree(source, target)
    index = FileSystemReader(target).read_metadata()
    file = next(target.glob("*.distcp"))
    known = [k for k, v in index.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)]
    stream = io.BytesIO()
    torch.save(Payload(), stream)
    any_place = next(iter(index.storage_data.values()))
    for key in known or ["optimizer_0.param_groups.evil"]:
        index.state_dict_metadata[key] = BytesStorageMetadata()
        offset, length = file.stat().st_size, len(stream.getvalue())
        with file.open("ab") as end:
            end.write(stream.getvalue())
        place = type(any_place)(file.name, offset, length)
        index.storage_data[MetadataIndex(key)] = place
    (target / ".metadata").write_bytes(pickle.dumps(index))


def settings(one: Path, place: Path) -> None:
    """Checkpoints whose settings name something else than a model, or one that is too large."""
    import torch

    content = torch.load(one, weights_only=True)
    hostile: dict[str, dict[str, Any]] = {
        "class": {"position": {"class_path": "os.system", "init_args": {"command": COMMAND}}},
        "popen": {"position": {"class_path": "subprocess.Popen",
                               "init_args": {"args": COMMAND, "shell": True}}},
        "optimizer": {"optimizer": {"class_path": "os.system", "init_args": {"command": COMMAND}}},
        "layers": {"network": {**content["hyper_parameters"]["network"], "num_layers": 200_000}},
        "width": {"network": {**content["hyper_parameters"]["network"], "hidden_size": 10**12}},
        "vocabulary": {"network": {**content["hyper_parameters"]["network"], "vocab_size": 10**15}},
        "text": {"network": {**content["hyper_parameters"]["network"], "num_heads": "many"}},
        "none": {"network": None},
        "list": {"position": ["RoPE"]},
    }  # fmt: skip
    for name, changed in hostile.items():
        new = {**content, "hyper_parameters": {**content["hyper_parameters"], **changed}}
        torch.save(new, place / f"settings-{name}.ckpt")
    for name, key, value in (
        ("no-weights", "state_dict", {}),
        ("weights-list", "state_dict", [1, 2]),
        ("step-text", "global_step", "six"),
        ("no-loops", "loops", None),
        ("moments", "optimizer_states", wrong_moments(content["optimizer_states"])),
        ("no-moments", "optimizer_states", [{}]),
        ("callbacks", "callbacks", {"StepCheckpoint": 3, "Metrics": []}),
        ("tokenizer", "CorpusDataModule", {"tokenizer": 3}),
        ("tokens", "CorpusDataModule", "text"),
    ):
        torch.save({**content, key: value}, place / f"content-{name}.ckpt")
    weights = {name: value * float("nan") for name, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": weights}, place / "content-nan.ckpt")
    torch.save([content], place / "content-in-a-list.ckpt")
    torch.save(torch.zeros(3), place / "content-a-tensor.ckpt")


def wrong_moments(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's state whose moments have other shapes than the weights."""
    import torch

    new = [dict(states[0])]
    new[0]["state"] = {
        number: {key: torch.zeros(1) if getattr(value, "ndim", 0) else value
                 for key, value in state.items()}
        for number, state in states[0]["state"].items()
    }  # fmt: skip
    return new


def sizes(world: Path, place: Path) -> None:
    """Folders whose config.json asks for too much, or for what is no number."""
    values: dict[str, tuple[str, Any]] = {
        "layers": ("num_hidden_layers", 200_000),
        "width": ("hidden_size", 10**12),
        "vocabulary": ("vocab_size", 10**15),
        "negative": ("num_attention_heads", -2),
        "fraction": ("num_attention_heads", 1.5),
        "text": ("num_hidden_layers", "many"),
        "null": ("hidden_size", None),
        "list": ("intermediate_size", [1]),
    }
    for name, (key, value) in values.items():
        folder = place / f"config-{name}"
        shutil.copytree(world / "reference", folder)
        config = json.loads((folder / "config.json").read_text())
        config[key] = value
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in {
        "deep": "[" * 200_000,
        "number": '{"vocab_size": ' + "9" * 10_000 + "}",
        "infinite": '{"rope_theta": 1e999}',
        "list": "[1]",
        "twice": '{"vocab_size": 257, "vocab_size": 3}',
    }.items():
        folder = place / f"json-{name}"
        shutil.copytree(world / "reference", folder)
        (folder / "config.json").write_text(text)
    folder = place / "escape"
    shutil.copytree(world / "reference", folder)
    weights = folder / "model.safetensors"
    (place / "elsewhere.safetensors").write_bytes(weights.read_bytes())
    weights.unlink()
    from safetensors import safe_open

    with safe_open(place / "elsewhere.safetensors", "pt") as tensors:  # type: ignore[no-untyped-call]
        names = list(tensors.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
