"""The forms that a run's checkpoint comes in."""

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ropepp.interop.saved import SavedModel, open_model
from ropepp.runs.shards import seal
from ropepp.train.optim import AdamW

STEPS = {"trainer__max_steps": 4, "checkpoint__every_n_steps": 2, "checkpoint__keep": 0}


def write_sharded(single: Path, saved: SavedModel, out: Path) -> Path:
    content = torch.load(single, weights_only=True)
    tensors = content.pop("state_dict")
    model = open_model(single).model.requires_grad_(True)
    optimizer = AdamW().build(model)
    optimizer.load_state_dict(content.pop("optimizer_states")[0])
    moments = get_optimizer_state_dict(model, optimizer)
    dcp.save({"state_dict": tensors, "optimizer_0": moments}, checkpoint_id=out, no_dist=True)
    torch.save(content, out / "meta.pt")
    seal(out)
    return out


def copied(source: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy" / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path((shutil.copytree if source.is_dir() else shutil.copy2)(source, target))
