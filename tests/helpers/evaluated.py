"""A small model with a tokenizer, a folder of it, and benchmark files in the published columns."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ropepp.data.tokenizer import BpeTokenizer
from ropepp.eval.evaluated_model import EvaluatedModel, ResultCache
from ropepp.eval.local_data import TASKS
from ropepp.interop.export import export
from ropepp.interop.saved import SavedModel
from ropepp.model.config import ModelConfig
from ropepp.model.positions import Position, RoPE
from ropepp.model.transformer import Transformer

WORDS = [f"{a}{b}{c}" for a in "bdklmt" for b in "aeiou" for c in ("n", "r", "st", "ll")]
HEADS = {"num_heads": 4, "num_kv_heads": 2}


def sentence(rng: Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def make_tokenizer() -> BpeTokenizer:
    """A byte-level BPE with end-of-text, and BOS before every text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([sentence(Random(0), 2000)], trainer)
    # As published tokenizers do; ours leaves it to the caller.
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair="$A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return BpeTokenizer(backend.to_str(), "test")


def make_model(vocab_size: int, position: Position | None = None, seed: int = 0) -> Transformer:
    """Two layers with weights so large that choices are far apart."""
    config = ModelConfig(vocab_size, 32, 2, ffn_size=48, init_std=0.3, **HEADS)
    return Transformer(config, position or RoPE(), seed=seed).eval().requires_grad_(False)


def make_subject(
    folder: Path, model: Transformer, tokenizer: Any, batch_tokens: int = 600
) -> EvaluatedModel:
    saved = SavedModel(model, folder, None, None, {})
    return EvaluatedModel(
        "tiny", saved, tokenizer, ResultCache(folder / "items.jsonl"), batch_tokens, "id"
    )


def write_folder(
    folder: Path, tokenizer: BpeTokenizer, seed: int = 0, position: Position | None = None
) -> Path:
    """A model as it is exported; a plain one as published ones are stored."""
    words = folder.with_name(f"{folder.name}-tokenizer")
    words.mkdir(parents=True)
    tokenizer.save(words)
    model = make_model(tokenizer.vocab_size, position, seed)
    export(SavedModel(model, folder, None, None, {}), folder, "hf", tokenizer=words)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmarks(data: Path, items: int, leave_out: tuple[str, ...] = ()) -> None:
    """Files of all tasks with made-up questions in the columns of the published data sets."""
    for number, (name, task) in enumerate(TASKS.items()):
        if name not in leave_out and name != "truthfulqa_mc2":
            rng = Random(number)
            rows = [ROWS[name](rng) for _ in range(items)]
            write_lines(task.file(data), rows)


def _choices(rng: Random, n: int) -> dict[str, Any]:
    return {"text": [sentence(rng, rng.randint(1, 4)) for _ in range(n)], "label": list("ABCD")[:n]}


def _truthful(rng: Random) -> dict[str, Any]:
    def targets(true: int) -> dict[str, Any]:
        labels = [1] * true + [0] * 3
        return {"choices": [sentence(rng, 3) for _ in labels], "labels": labels}

    return {"question": sentence(rng, 5), "mc1_targets": targets(1), "mc2_targets": targets(2)}


def _hellaswag(rng: Random) -> dict[str, Any]:
    return {
        "activity_label": sentence(rng, 2),
        "ctx_a": sentence(rng, 6) + ".",
        "ctx_b": sentence(rng, 2),
        "endings": [f"{sentence(rng, rng.randint(2, 6))} [step] ok" for _ in range(4)],
        "label": str(rng.randrange(4)),
    }


def _winogrande(rng: Random) -> dict[str, Any]:
    text = f"{sentence(rng, 4)} _ {sentence(rng, 4)}."
    one, two = rng.sample(WORDS, 2)
    return {"sentence": text, "option1": one, "option2": two, "answer": rng.choice("12")}


def _gpqa(rng: Random) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {i}": sentence(rng, 3) for i in (1, 2, 3)}
    return {"Question": sentence(rng, 8), "Correct Answer": sentence(rng, 2), **wrong}


def _record(rng: Random) -> dict[str, Any]:
    entities = rng.sample(WORDS, 4)
    return {
        "passage": f"{sentence(rng, 8)}\n@highlight\n{sentence(rng, 4)}",
        "query": f"{sentence(rng, 3)} @placeholder {sentence(rng, 2)}",
        "entities": entities,
        "answers": entities[:1],
    }


def _wic(rng: Random) -> dict[str, Any]:
    first = sentence(rng, 4)
    facts = {"sentence1": first, "sentence2": sentence(rng, 4), "label": rng.randrange(2)}
    return facts | {"start1": 0, "end1": first.index(" ")}


def _wsc(rng: Random) -> dict[str, Any]:
    words = sentence(rng, 8).split()
    facts = {"text": " ".join(words), "span1_text": words[0], "label": rng.randrange(2)}
    return facts | {"span2_index": 4, "span2_text": words[4]}


ROWS: dict[str, Callable[[Random], dict[str, Any]]] = {
    "truthfulqa_mc1": _truthful,
    "piqa": lambda r: {
        "goal": sentence(r, 5),
        "sol1": sentence(r, 4),
        "sol2": sentence(r, 4),
        "label": r.randrange(2),
    },
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": lambda r: {
        "question": sentence(r, 6),
        "choices": _choices(r, 4),
        "answerKey": r.choice("ABCD"),
    },
    "gpqa_main_zeroshot": _gpqa,
    "social_iqa": lambda r: {
        "context": sentence(r, 6),
        "question": sentence(r, 4) + "?",
        **{f"answer{x}": sentence(r, 2) for x in "ABC"},
        "label": r.choice("123"),
    },
    "openbookqa": lambda r: {
        "question_stem": sentence(r, 5),
        "choices": _choices(r, 4),
        "answerKey": r.choice("ABCD"),
    },
    "boolq": lambda r: {
        "passage": sentence(r, 8),
        "question": sentence(r, 4),
        "label": r.randrange(2),
    },
    "cb": lambda r: {
        "premise": sentence(r, 6),
        "hypothesis": sentence(r, 4),
        "label": r.randrange(3),
    },
    "copa": lambda r: {
        "premise": sentence(r, 4) + ".",
        "question": r.choice(["cause", "effect"]),
        "choice1": sentence(r, 3).capitalize(),
        "choice2": sentence(r, 3).capitalize(),
        "label": r.randrange(2),
    },
    "multirc": lambda r: {
        "paragraph": sentence(r, 8),
        "question": sentence(r, 3) + "?",
        "answer": sentence(r, 2),
        "label": r.randrange(2),
    },
    "record": _record,
    "sglue_rte": lambda r: {
        "premise": sentence(r, 6),
        "hypothesis": sentence(r, 4),
        "label": r.randrange(2),
    },
    "wic": _wic,
    "wsc": _wsc,
}
