"""What a run leaves in its folder before it trains: its configuration, and a line for people."""

from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]

from ropepp.files import write_text
from ropepp.model.flops import num_parameters
from ropepp.runs.machine import device_name
from ropepp.train.module import LanguageModel


class RunFiles(pl.Callback):
    """Writes ``config.yaml``, from which the run can be repeated, once all checks have passed.

    Args:
        directory: Folder of the run.
        config: The complete configuration as YAML.
        ckpt_path: The checkpoint from which the run goes on, if any.
        begun_from: The checkpoint that it was asked to begin with, if any.
    """

    def __init__(
        self, directory: Path, config: str, ckpt_path: str | None, begun_from: str | None
    ) -> None:
        self.directory = directory
        self.config = config
        self.ckpt_path = ckpt_path
        self.begun_from = begun_from

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LanguageModel)
        network, root_device = pl_module.network, trainer.strategy.root_device
        print(
            f"{type(network.position).__name__}: {num_parameters(network):,} parameters, "
            f"{pl_module.hparams['compute_dtype']}, {trainer.world_size} x "
            f"{device_name(root_device)}, seed {pl_module.seed}, to {self.directory}",
            flush=True,
        )
        if network.sequence is not None:
            print(_gathering(pl_module, trainer), flush=True)
        if self.ckpt_path:
            print(f"going on from {self.ckpt_path}", flush=True)
        content = yaml.safe_load(self.config)
        content.pop("config", None)  # the files that it was composed from
        # An interruption is no part of what the run is: its own checkpoints are not named.
        begun_from = Path(self.begun_from or "last")
        is_own = begun_from.name == "last" or self.directory in begun_from.parents
        content["ckpt_path"] = None if is_own else self.begun_from
        write_text(self.directory / "config.yaml", yaml.safe_dump(content, sort_keys=False))


def _gathering(module: LanguageModel, trainer: pl.Trainer) -> str:
    """What sharing rows sends: where EH halves the keys and values it halves this too."""
    network, data = module.network, trainer.datamodule  # type: ignore[attr-defined]
    assert network.sequence is not None
    config, width = network.config, 2 if network.compute_dtype == torch.bfloat16 else 4
    size = network.sequence.bytes_gathered(
        data.micro_batch_size, data.sequence_length, network.layout.num_kv_heads,
        config.head_dim, width,
    )  # fmt: skip
    return (
        f"rows shared by {network.sequence.size} processes: each receives "
        f"{size * config.num_layers:,} bytes of keys and values in a forward pass"
    )
