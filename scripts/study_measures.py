"""What studies measure of a trained run: ``python scripts/study_measures.py NAME RUN`` writes
RUN/measures.json."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropepp.data.loading.datamodule import CorpusDataModule
from ropepp.data.recall.accuracy import STREAM, count, distances, octaves
from ropepp.data.recall.task import RecallDataModule, RecallRows
from ropepp.data.tokens.corpus import Corpus
from ropepp.eval.analyze.attention_maps import MEASURES as LOOKS
from ropepp.eval.analyze.attention_maps import attention_maps
from ropepp.eval.analyze.heads import kinds_of
from ropepp.eval.analyze.noise import KINDS, UnitNoise, mean_loss, noisy_queries
from ropepp.eval.analyze.rows import BATCH_TOKENS, beginnings, recall_data
from ropepp.files import write_json
from ropepp.interop.saved import SavedModel, open_model
from ropepp.model.positions import PI, Position, RoPE, RoPEppEC, RoPEppEH, YaRN
from ropepp.model.transformer import Transformer
from ropepp.train.evaluation import Evaluation

VERSION = 1  # of all measures; it stands in their files
MULTIPLES = (1, 2, 4, 8)  # of the trained length
FAR = 4  # the multiple that comparisons are about
OTHER_PAIRS = (2, 8)  # than trained
ROWS = 256  # of recall, of each number of pairs and length
TEXTS = 32  # documents, or as many as are long enough
PIECES = 64  # rows of the trained length, spread over the validation split
THETAS = (1.0e4, 1.0e5)
STRENGTHS = (1.0, 2.0)  # standard deviations of the noise
DRAWS = 4


def stretched(position: Position, head_dim: int, trained: int) -> dict[str, Position]:
    """An encoding as it was trained, and by each method made for the longest rows. NTK raises theta
    to theta F^(R / (R - 2)), so that the slowest pair turns by 1/F (arXiv 2309.00071, eq. 16)."""
    found = {"plain": position}
    if isinstance(position, RoPE) and type(position) in (RoPE, RoPEppEC, RoPEppEH):
        F, R = float(MULTIPLES[-1]), position.rotary_dim(head_dim)
        found["pi"] = replace(position, scaling=PI(F))
        found["ntk"] = replace(position, theta=position.theta * F ** (R / (R - 2)))
        found["yarn"] = replace(position, scaling=YaRN(F, original_length=trained))
    return found


def each(model: Transformer, encodings: Mapping[str, Position]) -> Iterator[str]:
    """Sets the model's encoding to each of these in turn; its layers' part is the same for all."""
    plain = model.position
    for name, position in encodings.items():
        model.position = position
        yield name
    model.position = plain


def losses(model: Transformer, ids: Tensor) -> Tensor:
    """(B, T) float64, of rows (B, T + 1) that are a document each."""
    step = max(1, BATCH_TOKENS // ids.shape[1])
    return torch.cat([model.evaluate(x[:, :-1], x[:, 1:])[0] for x in ids.split(step)]).double()


def text(saved: SavedModel) -> dict[str, Any]:
    """Mean loss of text by octave of the position, up to 8 times the trained length, named by the
    first of its positions, from 16 on (all before are "0"); besides ``within`` and ``beyond`` the
    trained length, and ``excess``: beyond it less ``window``, the loss of the same targets by the
    encoding as it was trained, in windows of the trained length that move by half of it."""
    trained = saved.data_arguments["sequence_length"]
    longest = trained * MULTIPLES[-1]
    ids = beginnings(saved.corpora[0], TEXTS, longest).ids
    edges = [0, *(16 * 2**n for n in range((longest // 16).bit_length() - 1))]
    window = float(in_windows(saved.model, ids, trained).mean())
    found: dict[str, Any] = {"rows": len(ids), "window": round(window, 5), "loss": {}}
    model = saved.model
    for name in each(model, stretched(model.position, model.config.head_dim, trained)):
        by_position = losses(saved.model, ids).mean(0)
        parts = zip(edges, [*edges[1:], longest], strict=True)
        spans = {str(a): (a, b) for a, b in parts}
        spans |= {"within": (0, trained), "beyond": (trained, longest)}
        own = {span: float(by_position[a:b].mean()) for span, (a, b) in spans.items()}
        own["excess"] = own["beyond"] - window
        found["loss"][name] = {span: round(value, 5) for span, value in own.items()}
    return found


def in_windows(model: Transformer, ids: Tensor, W: int) -> Tensor:
    """(B, T - W) losses of the targets from position W on, of rows (B, T + 1), each behind W / 2 to
    W - 1 tokens: windows of W that begin at every half of W, of which the second half counts."""
    windows = ids.unfold(1, W + 1, W // 2)[:, 1:]  # (B, n, W + 1)
    return (
        losses(model, windows.flatten(0, 1))[:, W // 2 :].unflatten(0, windows.shape[:2]).flatten(1)
    )


def longer(saved: SavedModel) -> dict[str, Any]:
    """Loss of the validation split in rows of 4 times the trained length, by theta: what a
    continuation begins with."""
    arguments, model = saved.data_arguments, saved.model
    T = FAR * arguments["sequence_length"]
    rows = CorpusDataModule(**(arguments | {"sequence_length": T})).open("validation")
    step = max(1, BATCH_TOKENS // T)
    found: dict[str, Any] = {"rows": len(rows), "loss": {}}
    for name in each(
        model, {f"{theta:g}": replace(model.position, theta=theta) for theta in THETAS}
    ):
        evaluation = Evaluation(torch.device("cpu"))
        for start in range(0, len(rows), step):
            evaluation.update(model, rows.batch(range(start, min(start + step, len(rows)))))
        found["loss"][name] = round(float(evaluation.compute()["loss"]), 5)
    return found


def recall(saved: SavedModel) -> dict[str, Any]:
    """Accuracy of the answers by encoding, number of pairs, and multiple of the trained length;
    ``far``, of the questions of the rows of 4 times the length that are at least the trained length
    behind their pair; ``octaves``, right answers and questions by distance, named by the octave's
    first, of each length with the trained number of pairs."""
    data, model = recall_data(saved), saved.model
    trained = data.sequence_length
    encodings = stretched(model.position, model.config.head_dim, trained)
    found: dict[str, Any] = {"chance": 1 / (data.vocab_size // 3), "accuracy": {}, "far": {}}
    found["octaves"] = {}
    for name in each(model, encodings):
        asked = [(data.pairs, FAR)]
        if name == "plain":
            asked = [(data.pairs, m) for m in MULTIPLES]
            asked += [(n, m) for n in OTHER_PAIRS for m in (1, FAR)]
        own: dict[str, dict[str, float]] = {}
        for n, m in asked:
            hits, far = answers(model, data, n, m)
            own.setdefault(str(n), {})[f"{m}x"] = share(hits, far > 0)
            if (n, m) == (data.pairs, FAR):
                found["far"][name] = share(hits, far >= trained)
            if name == "plain" and n == data.pairs:
                right, number = count(hits, far, octaves(trained * m)).long().tolist()
                found["octaves"][f"{m}x"] = {
                    str(1 << k): [a, b] for k, (a, b) in enumerate(zip(right, number, strict=True))
                }
        found["accuracy"][name] = own
    return found


def answers(model: Transformer, data: RecallDataModule, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Of rows with n pairs and m times the trained length, (B, T) whether each token is foreseen,
    and how far behind its pair it is asked, 0 where nothing is. The rows are the same for all
    models of a length."""
    T = data.sequence_length * m
    batch = RecallRows(T, n, data.vocab_size, ROWS, None, data.seed, STREAM).batch(range(ROWS))
    step = max(1, BATCH_TOKENS // T)
    parts = zip(batch["input_ids"].split(step), batch["targets"].split(step), strict=True)
    hits = torch.cat([model.evaluate(ids, targets)[1] for ids, targets in parts])
    return hits, distances(batch, n)


def share(hits: Tensor, where: Tensor) -> float:
    """Of these tokens, those that were foreseen."""
    return round(float(hits[where].double().mean()), 5)


def pieces(folder: str, T: int, most: int) -> Tensor:
    """(B, T + 1) pieces of the validation split, evenly spread; each is read as one document."""
    tokens = Corpus.open(folder, "validation").tokens
    number = (len(tokens) - 1) // T
    chosen = np.unique(np.linspace(0, number - 1, min(most, number)).astype(int))
    rows = np.stack([tokens[T * n : T * n + T + 1] for n in chosen.tolist()])
    return torch.from_numpy(rows.astype(np.int64))


def heads(saved: SavedModel) -> dict[str, Any]:
    """By kind of head: what the loss gains by noise on its queries and by taking it out, and where
    it looks. Rows have the trained length and are spread over the validation split."""
    model = saved.model
    ids = pieces(saved.corpora[0], saved.data_arguments["sequence_length"], PIECES)

    def loss() -> float:
        return mean_loss(model, ids[:, :-1], ids[:, 1:], ("loss",))["loss"]

    kinds, clean = kinds_of(model.layout), loss()
    found: dict[str, Any] = {
        "rows": len(ids),
        "loss": clean,
        "heads": {k: len(own) for k, own in kinds.items()},
    }
    maps = attention_maps(model, ids[:, :-1])
    for kind in (kind for kind in KINDS if kind in kinds):
        own = maps.by_head[:, :, kinds[kind]].mean((0, 1, 2)).tolist()
        found[kind] = dict(zip(LOOKS, own, strict=True)) | {"removed": without(model, kind, loss)}
        found[kind]["removed"] -= clean
        for std in STRENGTHS:
            values = []
            for draw in range(DRAWS):
                with noisy_queries(model, std, kind, UnitNoise(draw)):
                    values.append(loss() - clean)
            found[kind][f"noise_{std:g}"] = sum(values) / DRAWS
    return found


def without(model: Transformer, kind: str, loss: Callable[[], float]) -> float:
    """The loss without what the heads of a kind add to the residual stream."""
    own, D = kinds_of(model.layout)[kind], model.config.head_dim
    columns = torch.tensor([h * D + i for h in own for i in range(D)])
    kept = []
    for block in model.blocks():
        weight = block.self_attn.o_proj.weight
        kept.append(weight.clone())
        weight[:, columns] = 0.0
    value = loss()
    for block, weight in zip(model.blocks(), kept, strict=True):
        block.self_attn.o_proj.weight.copy_(weight)
    return value


MEASURES: Mapping[str, Callable[[SavedModel], dict[str, Any]]] = {
    "text": text,
    "longer": longer,
    "recall": recall,
    "heads": heads,
}


@torch.no_grad()
def measure(name: str, run: Path) -> dict[str, Any]:
    """What `name` says of a run."""
    return {"measure": name, "version": VERSION} | MEASURES[name](open_model(run))


if __name__ == "__main__":
    write_json(Path(sys.argv[2]) / "measures.json", measure(sys.argv[1], Path(sys.argv[2])))
