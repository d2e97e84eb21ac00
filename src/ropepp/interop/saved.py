"""Opens any saved model by its path: a run, a checkpoint, a published or exported folder; and makes
a checkpoint, of the form that runs have, of a folder."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ropepp.data.tokenizer import BPE_FILE, TIKTOKEN_FILE, Tokenizer, load_tokenizer
from ropepp.data.tokens.corpus import read_meta
from ropepp.errors import InputError
from ropepp.model.config import ModelConfig
from ropepp.model.folders.hub import local_path
from ropepp.model.folders.published import check_shapes, load_pretrained, read_settings, unfilled
from ropepp.model.loss import IGNORE_INDEX
from ropepp.model.plain import from_plain, to_plain, understanding
from ropepp.model.transformer import Transformer
from ropepp.runs import checkpoints
from ropepp.runs.archives import write_archive
from ropepp.runs.settings import read_yaml
from ropepp.runs.shards import INDEX
from ropepp.train.weights import load_weights

TEXT = ("max_position_embeddings", "bos_token_id", "eos_token_id")  # of a model, not of its weights


@dataclass(frozen=True)
class SavedModel:
    """A model and what belongs to it."""

    model: Transformer  # in evaluation mode
    path: Path  # what was read: a checkpoint or a folder
    run: Path | None  # the run's folder; None for a published or exported one
    step: int | None  # optimizer steps behind the weights, if known
    config: dict[str, Any]  # the run's complete configuration, empty if there is none
    tokenizers: tuple[str, ...] = ()  # see `ropepp.runs.checkpoints.tokenizers`
    text: dict[str, Any] = field(default_factory=dict)  # what its files say of `TEXT`

    @property
    def name(self) -> str:
        """What tables call it: a run's folder by its last two parts, any other by its own name."""
        parts = (self.run or self.path).resolve().parts
        # The hub's models--OWNER--NAME/snapshots/HASH.
        if len(parts) > 2 and parts[-3].startswith("models--"):
            return parts[-3].rpartition("--")[2]
        return "/".join(parts[-2:]) if self.run else parts[-1]

    @property
    def data_class(self) -> str:
        """Name of the data module of its training, "" if unknown."""
        return str(self.config.get("data", {}).get("class_path", "")).rpartition(".")[2]

    @property
    def data_arguments(self) -> dict[str, Any]:
        """That module's arguments."""
        return self.config.get("data", {}).get("init_args", {})

    @property
    def corpora(self) -> list[str]:
        """Folders of the corpora that it was trained on, if any."""
        corpus = self.data_arguments.get("corpus") or []
        return [corpus] if isinstance(corpus, str) else list(corpus)

    def tokenizer(self, given: str | Path | None = None) -> Tokenizer:
        """The tokenizer of the model's text: the ``given`` one (see
        `ropepp.data.tokenizer.load_tokenizer`), or that beside the weights or of the run's corpus.
        An `InputError` if there is none, it has more ids than the model, or it is not that of the
        training (of a given one, a warning says so)."""
        place = given or self.tokenizer_place()
        if place is None:
            raise InputError(f"{self.path} names no tokenizer: give one with --tokenizer")
        tokenizer, size = load_tokenizer(place), self.model.config.vocab_size
        if tokenizer.vocab_size > size:
            raise InputError(
                f"tokenizer {place} has {tokenizer.vocab_size} ids, the model of {self.path} {size}"
            )
        try:
            self.require_tokenizer(tokenizer.fingerprint, place)
        except InputError as error:
            if not given:
                raise
            warnings.warn(str(error), stacklevel=2)
        return tokenizer

    def require_tokenizer(self, fingerprint: str, place: str | Path) -> None:
        """Raises an `InputError` if the model was trained with another tokenizer."""
        if self.tokenizers and fingerprint not in self.tokenizers:
            raise InputError(
                f"{place} has tokenizer {fingerprint[:12]}; the model of {self.path} was trained "
                f"with tokenizer {self.tokenizers[0][:12]}, to which its ids belong: give that one "
                "with --tokenizer, or prepare the text with it"
            )

    def require_finite(self) -> None:
        """Raises an `InputError` if a weight is NaN or infinite."""
        for name, tensor in self.model.state_dict().items():
            if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
                raise InputError(
                    f"{self.path}: tensor {name} holds NaN or infinity: the weights are damaged, "
                    "or the training has diverged"
                )

    def tokenizer_place(self) -> str | Path | None:
        """Where its tokenizer is: beside the weights, or in the run's corpus; None if nothing
        tells. An `InputError` if that corpus is not here."""
        for folder in (self.path, self.run or self.path):
            if any((folder / name).is_file() for name in (BPE_FILE, TIKTOKEN_FILE)):
                return folder
        if not self.corpora:
            return None
        corpus = Path(self.corpora[0])
        meta = corpus / "train" / "meta.json"
        if not meta.is_file():
            raise InputError(
                f"the model's corpus {corpus} is not here ({meta} is missing): give --tokenizer"
            )
        return "bytes" if read_meta(meta).tokenizer == "bytes" else corpus


def placement(device: str | None, dtype: str | None = None) -> tuple[str, torch.dtype]:
    """Where a model computes, a GPU if there is one unless given, and its dtype, bfloat16 there and
    float32 elsewhere unless given. An `InputError` if there is no such device here."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        raise InputError(f"--device is {device!r}; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    on_gpu = device.startswith("cuda")
    if on_gpu and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device is {device}; CUDA devices here: {torch.cuda.device_count()}")
    return device, getattr(torch, dtype or ("bfloat16" if on_gpu else "float32"))


def open_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> SavedModel:
    """Opens a model for evaluation or generation. Nothing in its files is executed, and what is
    read is compared with its checksums. An `InputError` if there is no such model, or it is damaged
    or of another shape than it says.

    ``path`` is a run's folder (its newest checkpoint that is not damaged is taken), a checkpoint, a
    folder with ``config.json`` as published or exported, or ``hub:NAME[@REVISION]``; ``dtype`` that
    of weights and activations. Weights in bfloat16 compute what training in bfloat16 over float32
    weights does; what a position encoding keeps stays float32."""
    path = local_path(path)
    if not path.is_dir() and not path.is_file():
        what = "is no file and no folder" if path.exists() else "does not exist"
        raise InputError(f"model {path} {what}")
    if path.is_dir() and (path / "config.json").is_file():
        model = load_pretrained(path)
        known, text = checkpoints.tokenizers(path), _text_of(read_settings(path / "config.json"))
        return SavedModel(_placed(model, dtype, device), path, None, None, {}, known, text)
    if path.is_dir() and not (path / checkpoints.METADATA).exists() and not (path / INDEX).exists():
        found = checkpoints.newest_complete(path / "checkpoints")
        found = found or checkpoints.newest_complete(path)
        if found is None:
            raise InputError(
                f"{path} is no model: it has neither config.json nor a complete checkpoint in it or"
                " in its checkpoints/"
            )
        path, model, content = checkpoints.first_whole(found, _from_checkpoint)
    else:
        path, model, content = _from_checkpoint(path)
    has = ("config.yaml", "checkpoints")  # a run's folder; others may have a file of the first name
    run = next((p for p in path.resolve().parents if all((p / x).exists() for x in has)), None)
    config = read_yaml(run / "config.yaml") if run else {}
    step, known = content.get("global_step"), checkpoints.tokenizers(path, content)
    saved = SavedModel(_placed(model, dtype, device), path, run, step, config, known)
    with understanding(f"{run}/config.yaml"):
        length = {"max_position_embeddings": saved.data_arguments.get("sequence_length")}
    return replace(saved, text=_text_of(length) | _text_of(content.get("text")))


def _text_of(content: Any) -> dict[str, int]:
    """What is there of `TEXT`; the first one where there are several."""
    content = content if isinstance(content, dict) else {}
    values = ((key, content.get(key)) for key in TEXT)
    found = {key: x[0] if isinstance(x, list) and x else x for key, x in values}
    return {key: x for key, x in found.items() if type(x) is int}


def _from_checkpoint(path: Path) -> tuple[Path, Transformer, dict[str, Any]]:
    """A checkpoint with its model and what else is in it."""
    content = checkpoints.read_checkpoint(path, "state_dict")
    settings = content.get("hyper_parameters")
    if not settings or "network" not in settings:
        raise InputError(f"{path} is a checkpoint of something else: it names no network")
    with understanding(path):
        config, position = ModelConfig(**settings["network"]), from_plain(settings["position"])
    model = unfilled(config, position, path, content.get("ignore_index", IGNORE_INDEX))
    # Before memory is taken: a file may say anything.
    check_shapes(model.state_dict(), checkpoints.shapes(path, content), path)
    model.to_empty(device="cpu")
    model.tie()
    load_weights(model, path, content)
    return path, model, content


def import_checkpoint(folder: str | Path, file: str | Path) -> dict[str, Any]:
    """Writes a checkpoint at step 0, with no optimizer's state, of what `open_model` opens; returns
    its hyperparameters, those of the network."""
    saved = open_model(folder)
    return write_checkpoint(Path(file), saved.model, saved.tokenizers, saved.text)


def write_checkpoint(
    file: Path, network: Transformer, prints: Sequence[str], text: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a checkpoint at step 0 with these fingerprints of tokenizers (see
    `ropepp.runs.checkpoints.tokenizers`) and values of `TEXT`; returns its hyperparameters."""
    # What training had besides is unknown, so that nothing can contradict a run that takes this.
    settings = {"network": asdict(network.config), "position": to_plain(network.position)}
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {f"network.{name}": x for name, x in network.state_dict().items()},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": settings,
        # For whoever opens the file; training takes its targets from the data.
        "ignore_index": network.ignore_index,
        checkpoints.TOKENIZERS: list(prints),
        "text": dict(text),
    }
    write_archive(content, file)
    return settings


def _placed(model: Transformer, dtype: torch.dtype, device: str | torch.device) -> Transformer:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.tie()
    return model.to(device).eval().requires_grad_(False)
