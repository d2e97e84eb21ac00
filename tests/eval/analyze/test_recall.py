"""Recall over distances: models whose answers are known, and loops."""

import pytest
import torch
from torch import Tensor

from ropepp.data.loading.loader import EvalLoader
from ropepp.data.recall.accuracy import STREAM, count, distances, octaves
from ropepp.data.recall.task import RecallRows
from ropepp.errors import InputError
from ropepp.eval.analyze.recall import recall_accuracy
from ropepp.model import ModelConfig, Transformer
from ropepp.model.positions import RoPE

CONFIG = ModelConfig(64, 16, 1, 2, 2, 16)


class Nearsighted(Transformer):
    """Answers right where the key is less than 20 tokens away, and nowhere else."""

    def evaluate(
        self,
        input_ids: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        hits = torch.zeros_like(targets, dtype=torch.bool)
        for b, t in (targets >= 0).nonzero().tolist():
            row = input_ids[b].tolist()
            hits[b, t] = t - row.index(row[t]) < 20
        return torch.zeros(targets.shape), hits


def rows_of(length: int, pairs: int, count: int) -> RecallRows:
    return RecallRows(length, pairs, 64, count, None, 0, STREAM)


def test_accuracy_by_distance() -> None:
    lengths, pairs = [32, 100], [3, 5]
    cells = recall_accuracy(Nearsighted(CONFIG, RoPE()), pairs, lengths, rows=40)
    answers: dict[tuple[int, int], list[bool]] = {}
    for n in pairs:
        for T in lengths:
            for row, targets in zip(
                *(rows_of(T, n, 40).batch(range(40))[k].tolist() for k in ("input_ids", "targets")),
                strict=True,
            ):
                for t in range(T):
                    if targets[t] >= 0:
                        d = t - row.index(row[t])
                        assert row[t - d + 1] == targets[t]  # the value follows the key
                        answers.setdefault((n, 2 ** (len(bin(d)) - 3)), []).append(d < 20)
    assert {(c.pairs, c.distance_low): (c.answers, c.hits) for c in cells} == {
        key: (len(found), sum(found)) for key, found in answers.items()
    }
    assert sum(cell.answers for cell in cells) == 40 * 2 * (3 + 5)
    by_distance = {cell.distance_low: cell.accuracy for cell in cells if cell.pairs == 3}
    assert by_distance[8] == 1
    assert 0 < by_distance[16] < 1
    assert by_distance[32] == by_distance[64] == 0
    assert all(cell.distance_high == 2 * cell.distance_low - 1 for cell in cells)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(CONFIG, RoPE())
    whole = recall_accuracy(model, [4], [24, 48], rows=10)
    monkeypatch.setattr("ropepp.eval.analyze.recall.BATCH_TOKENS", 72)
    assert recall_accuracy(model, [4], [24, 48], rows=10) == whole


def test_padding_and_several_processes_count_once() -> None:
    model, rows = Nearsighted(CONFIG, RoPE()), rows_of(50, 4, 7)

    def counted(batch: dict[str, Tensor]) -> Tensor:
        _, hits = model.evaluate(batch["input_ids"], batch["targets"])
        return count(hits, distances(batch, 4), octaves(50))

    whole = counted(rows.batch(range(7)))
    # The last batches end in padding.
    parts = [counted(batch) for rank in range(2) for batch in EvalLoader(rows, 3, rank, 2)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert whole[1].sum() == 28


def test_bad_input() -> None:
    model = Transformer(CONFIG, RoPE())
    with pytest.raises(InputError, match="vocab_size is 65; the model has 64"):
        recall_accuracy(model, [4], [32], vocab_size=65)
    with pytest.raises(InputError, match=r"data\.sequence_length is 8"):
        recall_accuracy(model, [4], [32, 8])
