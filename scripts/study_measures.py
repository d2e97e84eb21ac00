"""What studies measure of a trained run: ``python scripts/study_measures.py NAME RUN`` writes
RUN/measures.json."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropepp.data.recall.accuracy import STREAM
from ropepp.data.recall.task import RecallRows
from ropepp.eval.analyze.attention_maps import MEASURES as LOOKS
from ropepp.eval.analyze.attention_maps import attention_maps
from ropepp.eval.analyze.heads import kinds_of
from ropepp.eval.analyze.noise import KINDS, UnitNoise, mean_loss, noisy_queries
from ropepp.eval.analyze.rows import BATCH_TOKENS, beginnings, recall_data
from ropepp.files import write_json
from ropepp.interop.saved import SavedModel, open_model
from ropepp.model.positions import PI, Position, RoPE, RoPEppEC, RoPEppEH, YaRN
from ropepp.model.transformer import Transformer
from ropepp.train.evaluation import model_inputs

MULTIPLES = (1, 2, 4, 8)  # of the trained length
PAIRS = (2, 4, 8)
ROWS = 256  # of recall, of each number of pairs and length
TEXTS = 32  # documents, or as many as are long enough
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


def each(model: Transformer, trained: int) -> Iterator[str]:
    """Sets the model's encoding to each of these in turn; its layers' part is the same for all."""
    plain = model.position
    for name, position in stretched(plain, model.config.head_dim, trained).items():
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
    trained length."""
    trained = saved.data_arguments["sequence_length"]
    longest = trained * MULTIPLES[-1]
    ids = beginnings(saved.corpora[0], TEXTS, longest).ids
    edges = [0, *(16 * 2**n for n in range((longest // 16).bit_length() - 1))]
    found: dict[str, Any] = {"rows": len(ids), "loss": {}}
    for name in each(saved.model, trained):
        by_position = losses(saved.model, ids).mean(0)
        parts = zip(edges, [*edges[1:], longest], strict=True)
        spans = {str(a): (a, b) for a, b in parts}
        spans |= {"within": (0, trained), "beyond": (trained, longest)}
        found["loss"][name] = {
            span: round(float(by_position[a:b].mean()), 5) for span, (a, b) in spans.items()
        }
    return found


def recall(saved: SavedModel) -> dict[str, Any]:
    """Accuracy of the answers by encoding, number of pairs, and multiple of the trained length."""
    data = recall_data(saved)
    found: dict[str, Any] = {"chance": 1 / (data.vocab_size // 3), "accuracy": {}}
    for name in each(saved.model, data.sequence_length):
        own: dict[str, dict[str, float]] = {}
        for n in PAIRS:
            for multiple in MULTIPLES:
                T = data.sequence_length * multiple
                rows = RecallRows(T, n, data.vocab_size, ROWS, None, data.seed, STREAM)
                ids, targets, *_ = model_inputs(rows.batch(range(ROWS)))
                accuracy = mean_loss(saved.model, ids, targets, ("accuracy",))["accuracy"]
                own.setdefault(str(n), {})[f"{multiple}x"] = round(accuracy, 5)
        found["accuracy"][name] = own
    return found


def heads(saved: SavedModel) -> dict[str, Any]:
    """By kind of head: what the loss gains by noise on its queries and by taking it out, and where
    it looks. Rows have the trained length."""
    model = saved.model
    T = saved.data_arguments["sequence_length"]
    ids = beginnings(saved.corpora[0], TEXTS, T).ids

    def loss() -> float:
        return mean_loss(model, ids[:, :-1], ids[:, 1:], ("loss",))["loss"]

    kinds, clean = kinds_of(model.layout), loss()
    found: dict[str, Any] = {"loss": clean, "heads": {k: len(own) for k, own in kinds.items()}}
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
    "recall": recall,
    "heads": heads,
}


@torch.no_grad()
def measure(name: str, run: Path) -> dict[str, Any]:
    """What `name` says of a run."""
    return MEASURES[name](open_model(run))


if __name__ == "__main__":
    write_json(Path(sys.argv[2]) / "measures.json", measure(sys.argv[1], Path(sys.argv[2])))
