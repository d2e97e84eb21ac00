"""A run does not read from the device what it does not have to: a host that waits for a GPU cannot
keep it busy. Counted on the CPU, by the operations that would wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.fit_runs import fit
from ropepp.model import loss
from ropepp.train.evaluation import on_the_way
from ropepp.train.module import LanguageModel

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}


class Waits(TorchDispatchMode):
    """Counts operations whose result the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put) else ()
        masked = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        self.count += masked or func.overloadpacket in WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_once_an_optimizer_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    waits, counts = Waits(), []

    def begin(self: LanguageModel, batch: Any, batch_idx: int) -> None:
        waits.count = 0
        waits.__enter__()

    def end(self: LanguageModel, outputs: Any, batch: Any, batch_idx: int) -> None:
        waits.__exit__(None, None, None)
        counts.append(waits.count)

    # Lightning calls these with a batch on its device, before and after all callbacks.
    monkeypatch.setattr(LanguageModel, "on_train_batch_start", begin)
    monkeypatch.setattr(LanguageModel, "on_train_batch_end", end)
    softmax = loss.losses_and_gradient

    def of_the_cpu(*args: Any) -> Tensor:
        before = waits.count
        found = softmax(*args)
        waits.count = before  # a GPU has a kernel in its place
        return found

    monkeypatch.setattr(loss, "losses_and_gradient", of_the_cpu)
    tolist = torch.Tensor.tolist

    def counted(self: Tensor) -> Any:
        waits.count += self.dtype != torch.int32  # as the host's own boundaries of documents are
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    changes = {"trainer__strategy": strategy, "data__micro_batch_size": 2}
    fit(corpus, tmp_path, "run", trainer__max_steps=2, metrics__every_n_steps=9, **changes)
    # The norm of the gradient, which decides whether there is a step at all.
    assert counts == [0, 0, 0, 1] * 2


def test_what_is_found_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[0, 0, 1], [0, 1, -1]])
    batch = {"input_ids": ids.clone(), "document_ids": ids, "num_targets": 4}
    found = on_the_way(batch, torch.device("cpu"))
    assert found["document_ids"].lengths == (2, 1, 1, 1, 1)
    assert batch["document_ids"] is ids
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    on_the_way(batch, torch.device("cuda"))
    assert [x.dtype for x in pinned] == [torch.int64, torch.int32]
