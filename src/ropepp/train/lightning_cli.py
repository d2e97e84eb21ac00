"""``ropepp fit | validate | test | predict``: Lightning's command line, in run directories."""

import logging
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from ropepp.data.loading.datamodule import RowsDataModule
from ropepp.errors import Diverged, InputError, Stopped, at_least
from ropepp.files import held, require_writable, run_folder, write_json
from ropepp.model.folders.hub import local_path
from ropepp.runs.checkpoints import list_checkpoints, newest_complete, torn
from ropepp.runs.records import DIVERGED, METRICS, RESULT, read_result
from ropepp.runs.settings import check_references, names_file, read_settings
from ropepp.runs.survival import lasting_output
from ropepp.train.callbacks import run_files
from ropepp.train.callbacks.checkpoint import StepCheckpoint
from ropepp.train.callbacks.metrics import Metrics
from ropepp.train.callbacks.profile import StepProfile
from ropepp.train.callbacks.progress import StepProgress
from ropepp.train.callbacks.suite import SuiteEvaluation
from ropepp.train.checkpoint_files import CheckpointFiles
from ropepp.train.guard import StepGuard
from ropepp.train.launching import default_run_name, is_child_process, is_first_process, own_process
from ropepp.train.logger import RunLogger
from ropepp.train.module import LanguageModel
from ropepp.train.parsing import PARSER_MODE, explained, prepare_parsing

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "use_distributed_sampler": False,  # the loader gives each process its part
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "enable_autolog_hparams": False,  # RunFiles gives loggers the whole configuration
    # What FSDP2 gathers in inference mode, as Lightning evaluates over NCCL, cannot train later.
    "inference_mode": False,
    "log_every_n_steps": 1,  # for Lightning's own log; ours has an interval of its own
}

# Keys of the trainer that would have no effect here, or cut a step short: what may stand there.
FIXED = dict(  # noqa: C408
    fast_dev_run="0 False", max_epochs="-1", min_epochs="", min_steps="", max_time="",
    limit_train_batches="1.0", overfit_batches="0 0.0", val_check_interval="1.0",
    check_val_every_n_epoch="1", log_every_n_steps="1", gradient_clip_algorithm="norm",
    use_distributed_sampler="False", reload_dataloaders_every_n_epochs="0", barebones="False",
    enable_checkpointing="True", enable_autolog_hparams="False", sync_batchnorm="False",
    model_registry="",
)  # fmt: skip
CHILDREN_SECONDS = 60.0  # that the other processes of this machine may take to end

# Of a process among those of a run.
PLACE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK")


def run_options(
    seed_everything: int = 0,
    experiment: str = "default",
    run: str | None = None,
    logs: str = "logs",
    resume: Literal["auto"] | None = None,
    init_from: str | None = None,
    init_optimizer: bool = False,
    fresh_optimizer: bool = False,
) -> None:
    """Options of every command here, besides model, data and trainer.

    Args:
        seed_everything: Seed of initial weights, order of rows and everything else that is random.
        experiment: Folder of related runs.
        run: Name of this run, in LOGS/EXPERIMENT/RUN; one with the time unless given.
        logs: Folder of all experiments.
        resume: auto: go on from the run's newest complete checkpoint if it has one, else begin
            (from ckpt_path or init_from, if given); the same command serves every attempt.
        init_from: Weights to begin with: a checkpoint, sharded or one file, a folder in the
            published format, or hub:NAME[@REVISION]. Steps, schedule and data begin anew.
        init_optimizer: Whether to begin with the optimizer's moments of init_from too.
        fresh_optimizer: Whether the optimizer begins anew where all else goes on from ckpt_path.
    """


class RopeppCLI(LightningCLI):
    """Composes model, data and trainer from YAML files and flags; every run has a directory."""

    def __init__(self, args: list[str]) -> None:
        prepare_parsing()
        self.started = time.time()
        super().__init__(
            LanguageModel,
            RowsDataModule,
            subclass_mode_data=True,
            save_config_callback=None,  # RunFiles writes it, complete and atomically
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"parser_mode": PARSER_MODE, "exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(run_options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Metrics, "metrics")
        parser.add_lightning_class_args(StepGuard, "guard")
        parser.add_lightning_class_args(StepProfile, "profile")
        parser.add_lightning_class_args(SuiteEvaluation, "suite")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        for option, following in pairwise([*args, ""]):
            key, _, value = option.partition("=")
            value = following if option == "--config" else value or key
            given = key == "--config" or names_file(value) or value.endswith(".json")
            if given and os.path.exists(value) and (key == "--config" or os.path.isfile(value)):
                # For what the parser does not see, as a key twice, or not in time.
                content = read_settings(Path(value))
                if key == "--config" and not isinstance(content, dict):
                    raise InputError(f"{value} is no configuration: it has no keys")
                check_references(content, value)
        # Lightning's own version warns where arguments are given by a caller, as they are here.
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if (better := explained(error)) is None:
                raise
            raise better from error
        except (OmegaConfBaseException, RecursionError) as error:
            raise InputError(f"the configuration's ${{...}}: {error}") from error
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}; allowed are 0 to 2**32 - 1")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint's hyperparameters win silently."""

    @property
    def options(self) -> Any:
        return self.config[self.subcommand]

    @property
    def directory(self) -> Path:
        return run_folder(Path(self.options.logs), self.options.experiment, self.options.run)

    def before_instantiate_classes(self) -> None:
        options, fitting = self.options, self.subcommand == "fit"
        options.run = default_run_name() if options.run is None else options.run
        if options.resume and not fitting:
            raise InputError("resume is for fit; give --ckpt_path, which may be last")
        if fitting:
            self._check_trainer()
        self.begun_from, folder = options.get("ckpt_path"), self.directory / "checkpoints"
        if self.begun_from and options.init_from:
            raise InputError(
                f"ckpt_path is {self.begun_from} and init_from is {options.init_from}; give one, "
                "to go on from the first or to begin with the weights of the second"
            )
        self.fall_back = False  # to an older checkpoint, should one be damaged
        self.seen = list_checkpoints(folder)
        if options.resume:
            self._leave_if_finished()
        if options.resume or self.begun_from == "last":
            found = newest_complete(folder)
            if found is None and (self.seen or not options.resume):
                raise InputError(
                    f"{folder} holds no complete checkpoint (step-N.ckpt) to go on from; damaged: "
                    f"{len(self.seen)} (without them --resume auto begins anew)"
                )
            options.ckpt_path = str(found) if found else self.begun_from
            self.fall_back = found is not None
        if options.init_optimizer and not options.init_from:
            raise InputError("init_optimizer is true, but there is no init_from to take it from")
        if options.fresh_optimizer and not options.get("ckpt_path"):
            raise InputError("fresh_optimizer is true, but there is no ckpt_path to go on from")
        ckpt_path, result = options.get("ckpt_path"), self.directory / RESULT
        if not fitting and not ckpt_path and not options.init_from:
            warnings.warn("no ckpt_path: the weights are new ones; last is the run's newest")  # noqa: B028
        if ckpt_path:
            self._check_checkpoint(Path(ckpt_path))
        elif not fitting or options.resume or is_child_process():  # the first may have begun
            return
        elif self.seen or result.exists():
            raise InputError(
                f"{self.directory} holds a run already: choose another --run, go on with it "
                "(--resume auto) or delete it"
            )

    def _check_trainer(self) -> None:
        """Refuses keys of the trainer that would have no effect, or spoil the mean of a step."""
        at_least(0, "trainer.", gradient_clip_val=self.options.trainer.get("gradient_clip_val"))
        for key, allowed in FIXED.items():
            value = self.options.trainer.get(key)
            if value is not None and str(value) not in allowed.split():
                raise InputError(
                    f"trainer.{key} is {value!r}, which fit does not serve: leave it out, and give "
                    "trainer.max_steps, data.validate_every_n_steps, metrics.every_n_steps"
                )

    def _run_subcommand(self, subcommand: str) -> None:
        if is_first_process() and subcommand == "fit":
            with held(self.directory / ".fit.lock"):
                if list_checkpoints(self.directory / "checkpoints") != self.seen:
                    raise InputError(f"{self.directory} was in use until now: begin again")
                require_writable(self.directory / "checkpoints", folder=True)
                for name in (METRICS, RESULT, "config.yaml"):
                    require_writable(self.directory / name)
                self._run_and_wait(subcommand)
            return
        if is_first_process():
            require_writable(self.directory, folder=True)
        self._run_and_wait(subcommand)

    def _run_and_wait(self, subcommand: str) -> None:
        """The others of this machine end with this process, so it waits for what they still do."""
        stopped = None
        try:
            super()._run_subcommand(subcommand)
        except Stopped as error:
            stopped = error
        for child in getattr(self.trainer.strategy.launcher, "procs", ()):
            with suppress(subprocess.TimeoutExpired):
                child.wait(CHILDREN_SECONDS)
        if stopped is not None:
            raise stopped

    def _leave_if_finished(self) -> None:
        """Ends successfully where there is nothing left to do."""
        result = read_result(self.directory)
        if not result or result.get("steps", -1) < self.options.trainer.max_steps:
            return
        if DIVERGED in result:
            raise Diverged(f"{self.directory} is finished: {result[DIVERGED]}")
        if not is_child_process():
            print(f"{self.directory} is finished; see {self.directory / RESULT}")
        sys.exit(0)

    def _check_checkpoint(self, path: Path) -> None:
        if reason := torn(path):
            raise InputError(f"ckpt_path is {path}, which is torn: {reason}")
        strategy = self.options.trainer.strategy
        name = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
        if path.is_dir() and name.rpartition(".")[2] not in ("fsdp2", "FSDP2Strategy"):
            raise InputError(
                f"ckpt_path is {path}, a sharded checkpoint, and trainer.strategy is {name!r}: use "
                "fsdp2, which serves one process too, or `ropepp checkpoint consolidate` first"
            )

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if not self.options.get("ckpt_path"):
            init_from = self.options.init_from
            self.model.init_from = init_from and str(local_path(init_from))
            self.model.init_optimizer = self.options.init_optimizer
        elif self.options.ckpt_path == self.begun_from:  # not where the run itself goes on
            self.model.fresh_optimizer = self.options.fresh_optimizer

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = {**self._get(self.config_init, "trainer"), **kwargs}
        # The suite comes before what measures speed and what may end the run at this step.
        keys = ("suite", "metrics", "checkpoint", "guard", "profile")
        callbacks = [self._get(self.config_init, key) for key in keys]
        _, metrics, checkpoint, _, profile = callbacks
        checkpoint.directory = self.directory / "checkpoints"
        profile.directory = self.directory / "profile"
        if self.subcommand == "fit" and trainer.get("enable_progress_bar") is not False:
            callbacks.append(StepProgress(metrics, self.options.run))
            trainer["enable_progress_bar"] = False  # Lightning's, which counts micro-batches
        if self.subcommand == "predict":
            callbacks.append(run_files.PredictionWriter(self.directory / "predictions"))
        loggers = trainer.get("logger")
        if self.subcommand == "fit" and loggers is not False:
            others = [one for one in _listed(loggers) if one is not True]
            trainer["logger"] = [RunLogger(self.directory), *others]
        else:
            trainer["logger"] = loggers or False
        trainer["default_root_dir"] = trainer.get("default_root_dir") or str(self.directory)
        if self.subcommand == "fit":
            text = self._parser("fit").dump(self.options, skip_unset=False, format="yaml")
            begun_from, ckpt_path = self.begun_from, self.options.ckpt_path
            callbacks.append(run_files.RunFiles(self.directory, text, ckpt_path, begun_from))
        self.metrics = metrics
        trainer["plugins"] = [*_listed(trainer.get("plugins")), CheckpointFiles(self.fall_back)]
        try:
            made = self._instantiate_trainer(trainer, callbacks)
        except InputError:
            raise
        except (ValueError, TypeError) as error:  # of Lightning, in words
            raise InputError(f"trainer: {error}") from error
        # Lightning's own handlers exchange messages inside the handler, which deadlocks processes
        # that are at different places. Until it trains, a signal ends a run at once.
        made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return made

    def after_fit(self) -> None:
        """Validates on all rows and writes ``result.json``."""
        if self.trainer.state.status != "finished":
            return
        self.trainer.limit_val_batches = self.options.trainer.limit_val_batches or 1.0
        seconds = time.time() - self.started
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        outcome = self._outcome()
        if self.trainer.is_global_zero:
            result = run_files.describe_run(
                self.trainer, self.model, self.metrics, outcome, seconds
            )
            if isinstance(self.trainer.logger, RunLogger):
                self.trainer.logger.log_by_position(self.model.loss_by_position)
            file = self.directory / RESULT
            if file.exists() and not read_result(self.directory):
                file.rename(file.with_name(f"{RESULT}.damaged"))
            write_json(file, result)
            print_outcome(outcome)
        refuse_infinite({**outcome, "train/loss": self.metrics.latest.get("train/loss", 0.0)})

    def _outcome(self) -> dict[str, float]:
        metrics = self.trainer.callback_metrics
        return {k: float(v) for k, v in metrics.items() if k.startswith(("validation", "test"))}

    def _evaluate(self, subcommand: str, **kwargs: Any) -> None:
        """Runs, prints and writes ``validate.json`` or ``test.json``."""
        getattr(self.trainer, subcommand)(**{**kwargs, "verbose": False})
        outcome = self._outcome()
        if self.trainer.is_global_zero:
            path = self.directory / f"{subcommand}.json"
            print_outcome(outcome)  # first: the disk may be full by now
            write_json(path, run_files.strict({"ckpt_path": self.options.ckpt_path, **outcome}))
            print(f"written to {path}")
        refuse_infinite(outcome)

    validate, test = partialmethod(_evaluate, "validate"), partialmethod(_evaluate, "test")


def _listed(value: Any) -> list[Any]:
    """What is given as one, a list or not at all."""
    return [] if value is None else value if isinstance(value, list) else [value]


def refuse_infinite(outcome: dict[str, float]) -> None:
    """Raises `Diverged` if a number that a run came to is none."""
    if found := run_files.infinite(outcome):
        raise Diverged(f"{found}: the weights are useless; lower the learning rate")


def print_outcome(outcome: dict[str, float]) -> None:
    for key, value in outcome.items():
        print(f"{key:<28} {value:.4f}")


def main(args: list[str]) -> None:
    """Runs one of Lightning's subcommands; ``args`` begins with its name."""
    # What Lightning says at every start is in the run's own first line; its warnings stay.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")
    own = [name for name in PLACE if name not in os.environ]
    try:
        with lasting_output(), own_process():
            RopeppCLI(args)
    except Stopped:
        # A process that Lightning started must not fail before the first one has said why: it
        # would be taken for a crash and the first one killed.
        if is_child_process() and "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        raise
    finally:
        # With these a run that is started from here on would wait for another's processes, or meet
        # them at their port.
        for name in own:
            os.environ.pop(name, None)
