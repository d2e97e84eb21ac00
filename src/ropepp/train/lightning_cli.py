"""``ropepp fit | validate | test | predict``: Lightning's command line with this project's run
directories."""

import logging
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import ropepp.data.recall  # noqa: F401 (makes its short class name known)
from ropepp.data.datamodule import RowsDataModule
from ropepp.errors import InputError
from ropepp.model.positions import Position, Scaling
from ropepp.train.callbacks.checkpoint import StepCheckpoint, list_checkpoints
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.callbacks.predictions import PredictionWriter
from ropepp.train.callbacks.progress import StepProgress
from ropepp.train.callbacks.run_files import RunFiles
from ropepp.train.logger import RunLogger
from ropepp.train.module import LanguageModel
from ropepp.train.optim import OptimizerSpec
from ropepp.train.result import describe_run, write_json
from ropepp.train.schedules import Schedule

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "use_distributed_sampler": False,  # the loader gives each process its part
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 1,  # for Lightning's own log; ours has an interval of its own
}


SPECS = {
    "position": Position,
    "scaling": Scaling,
    "optimizer": OptimizerSpec,
    "schedule": Schedule,
    "data": RowsDataModule,
}


class RopeppCLI(LightningCLI):
    """Composes model, data and trainer from YAML files and flags, and gives every run a
    directory."""

    def __init__(self, args: list[str]) -> None:
        set_parsing_settings(subclasses_enabled=list(SPECS.values()))
        self.started = time.time()
        super().__init__(
            LanguageModel,
            RowsDataModule,
            subclass_mode_data=True,
            save_config_callback=None,  # RunFiles writes it, complete and atomically
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of initial weights, order of rows and everything else that is random.",
        )
        parser.add_argument(
            "--experiment", type=str, default="default", help="Folder of related runs."
        )
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of this run, by default the time of its start; its folder is "
            "LOGS/EXPERIMENT/RUN.",
        )
        parser.add_argument("--logs", type=str, default="logs", help="Folder of all experiments.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Metrics, "metrics")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own version warns where arguments are given by a caller, as they are here.
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            better = explained(error)
            if better is None:
                raise
            raise better from error

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone: Lightning would let the checkpoint's hyperparameters win
        silently."""

    @property
    def options(self) -> Any:
        return self.config[self.subcommand]

    @property
    def directory(self) -> Path:
        """Folder of this run."""
        return Path(self.options.logs, self.options.experiment, self.options.run)

    def before_instantiate_classes(self) -> None:
        self.options.run = self.options.run or default_run_name()
        if self.options.get("ckpt_path") == "last":
            self.options.ckpt_path = str(newest_checkpoint(self.directory / "checkpoints"))
        ckpt_path = self.options.get("ckpt_path")
        if ckpt_path and not Path(ckpt_path).exists():
            raise InputError(f"ckpt_path is {ckpt_path}, which does not exist")
        if self.subcommand == "fit" and not ckpt_path:
            self._refuse_taken_directory()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        checkpoint, metrics = (
            self._get(self.config_init, key) for key in ("checkpoint", "metrics")
        )
        checkpoint.directory = self.directory / "checkpoints"
        progress = StepProgress(metrics)
        progress.label = self.options.run
        trainer = dict(self._get(self.config_init, "trainer"))
        given = trainer.pop("callbacks", None) or []
        callbacks = [*(given if isinstance(given, list) else [given]), metrics, checkpoint]
        if trainer.get("enable_progress_bar") is not False:
            callbacks.append(progress)
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(self.directory / "predictions"))
        if trainer.get("logger") in (None, True):
            trainer["logger"] = RunLogger(self.directory) if self.subcommand == "fit" else False
        trainer["default_root_dir"] = trainer.get("default_root_dir") or str(self.directory)
        if self.subcommand == "fit":
            text = self._parser("fit").dump(self.options, skip_unset=False, format="yaml")
            callbacks.append(RunFiles(self.directory, text, self.options.ckpt_path))
        self.metrics = metrics
        return self.trainer_class(**{**trainer, **kwargs, "callbacks": callbacks})

    def _refuse_taken_directory(self) -> None:
        if int(os.environ.get("LOCAL_RANK", "0")):  # the first process may have begun already
            return
        checkpoints = list_checkpoints(self.directory / "checkpoints")
        if checkpoints or (self.directory / "result.json").exists():
            raise InputError(
                f"{self.directory} holds a run already: choose another --run, go on with it "
                "(--ckpt_path last) or delete it"
            )

    def after_fit(self) -> None:
        """Validates on all rows and writes ``result.json``."""
        if self.trainer.state.status != "finished":
            return
        self.trainer.limit_val_batches = self.options.trainer.limit_val_batches or 1.0
        seconds = time.time() - self.started
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        outcome = self._outcome()
        if self.trainer.is_global_zero:
            length = self.datamodule.sequence_length
            result = describe_run(self.trainer, self.model, self.metrics, outcome, length, seconds)
            write_json(self.directory / "result.json", result)
            print_outcome(outcome)

    def _outcome(self) -> dict[str, float]:
        """What the last evaluation found."""
        metrics = self.trainer.callback_metrics
        return {k: float(v) for k, v in metrics.items() if k.startswith(("validation", "test"))}

    def validate(self, **kwargs: Any) -> None:
        self._evaluate("validate", kwargs)

    def test(self, **kwargs: Any) -> None:
        self._evaluate("test", kwargs)

    def _evaluate(self, subcommand: str, kwargs: dict[str, Any]) -> None:
        """Runs, prints and writes ``validate.json`` or ``test.json``."""
        getattr(self.trainer, subcommand)(**{**kwargs, "verbose": False})
        outcome = self._outcome()
        if self.trainer.is_global_zero:
            path = self.directory / f"{subcommand}.json"
            write_json(path, {"ckpt_path": self.options.ckpt_path, **outcome})
            print_outcome(outcome)
            print(f"written to {path}")


def print_outcome(outcome: dict[str, float]) -> None:
    """One line a metric."""
    for key, value in outcome.items():
        print(f"{key:<28} {value:.4f}")


def explained(error: ArgumentError) -> InputError | None:
    """What is wrong and what is allowed, where the parser's error lists all that it tried."""
    text = " ".join(str(error).split())
    key = re.search(r'Parser key "([^"]+)"', text)
    option = re.search(r"given class_path '([^']+)': Option '([^']+)' is not accepted", text)
    if key and option:
        return InputError(f"{key[1]}: {option[1]} has no argument {option[2]!r}")
    unknown = re.search(r"Expected a dot import path string: (\S+)", text)
    base = SPECS.get(key[1].rsplit(".", 1)[-1]) if key else None
    if key and unknown and base is not None:
        names = ", ".join(sorted(kind.__name__ for kind in subclasses(base)))
        return InputError(f"{key[1]} is {unknown[1]!r}; allowed: {names}, a class path or a file")
    return None


def subclasses(base: type) -> set[type]:
    """All classes below ``base`` that have been imported."""
    found: set[type] = set(base.__subclasses__())
    return found.union(*(subclasses(kind) for kind in found))


def default_run_name() -> str:
    """The job's id under a scheduler, the same in all its processes; otherwise the time of the
    start."""
    for variable in ("ROPEPP_RUN", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(variable, "none") != "none":
            return os.environ[variable]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--run is missing: with several processes and no job id each would make up its own"
        )
    # Processes that this one starts inherit the name.
    os.environ["ROPEPP_RUN"] = time.strftime("%Y%m%d-%H%M%S")
    return os.environ["ROPEPP_RUN"]


def newest_checkpoint(directory: Path) -> Path:
    """The newest complete checkpoint in a folder.

    Raises:
        InputError: There is none.
    """
    found = list_checkpoints(directory)
    if not found:
        raise InputError(f"ckpt_path is 'last', but {directory} holds no checkpoint (step-N.ckpt)")
    return found[-1]


def main(args: list[str]) -> None:
    """Runs one of Lightning's subcommands; ``args`` begins with its name."""
    # What Lightning says at every start is in the run's own first line; its warnings stay.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    RopeppCLI(args)
