"""Loss and accuracy over an evaluation set, and the loss by position."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ropepp.errors import InputError
from ropepp.model.documents import Documents
from ropepp.model.transformer import Transformer


class Evaluation:
    """Accumulates over the batches of one set, which are on ``device``, over all processes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: Sums | None = None  # of losses, targets and hits, one for each position

    def update(self, network: Transformer, batch: dict[str, Any]) -> None:
        """Evaluates ``network`` on a batch, see `ropepp.data.loading.loader.Rows`."""
        ids, targets, positions, _ = inputs = model_inputs(batch)
        nll, hits = network.evaluate(*inputs)
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand_as(ids)
        if self._sums is None:
            self._sums = Sums(3 * T, self.device)
        place = network.local_part(positions).flatten()
        counted = network.local_part(targets) != network.ignore_index
        zeros = torch.zeros_like(self._sums.total[:T])
        own = (zeros.index_add(0, place, x.flatten().to(zeros)) for x in (nll, counted, hits))
        self._sums.update(torch.cat(list(own)))

    def compute(self) -> dict[str, Tensor]:
        """Mean loss in nats, its exponential, and accuracy; the same on all processes."""
        losses, counts, hits = (part.sum() for part in self._totals())
        loss = (losses / counts).float()
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": (hits / counts).float()}

    def by_position(self) -> dict[str, list[float]]:
        """Mean loss of tokens with about as much context before them in document and row, in bins,
        four an octave: ``position`` (mean of the bin's tokens), ``loss`` in nats and ``count`` of
        each bin that has tokens."""
        sums, counts, _ = (part.cpu().double() for part in self._totals())
        position = torch.arange(len(sums), dtype=torch.float64)
        bin_of = context_bins(len(sums))
        places, losses, total = map(bin_of.bincount, (position * counts, sums, counts))
        filled = total > 0
        found = {"position": places / total, "loss": losses / total, "count": total}
        return {key: values[filled].tolist() for key, values in found.items()}

    def _totals(self) -> tuple[Tensor, ...]:
        """Losses, targets and hits of all processes, each (T,)."""
        if self._sums is None:
            raise InputError("the evaluation set has no rows")
        return self._sums.compute().view(3, -1).unbind()


def on_the_way(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the host, ready for ``device``: documents found, and pinned for a GPU."""
    ids = batch.get("document_ids")
    if isinstance(ids, Tensor):
        batch = {**batch, "document_ids": Documents.from_ids(ids) or ids}
    if device.type != "cuda":
        return batch
    kinds = (Tensor, Documents)
    return {k: x.pin_memory() if isinstance(x, kinds) else x for k, x in batch.items()}


def model_inputs(
    batch: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | Documents | None]:
    """Input ids, targets, positions and documents of a batch, the last two if it has them."""
    return batch["input_ids"], batch["targets"], batch.get("positions"), batch.get("document_ids")


class Sums(Metric):
    """Sums of ``n`` values each, over batches and processes, added up on ``device``."""

    total: Tensor

    def __init__(self, n: int, device: torch.device) -> None:
        super().__init__()
        # In float64 the order of additions does not show; not every device has it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.add_state("total", torch.zeros(n, dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, values: Tensor) -> None:
        """Adds (n,) values."""
        self.total = self.total + values

    def compute(self) -> Tensor:
        """(n,) the sums."""
        return self.total


def context_bins(length: int) -> Tensor:
    """(length,) the bin of each position, four an octave of the tokens up to it."""
    position = torch.arange(length, dtype=torch.float64)
    return (4 * torch.log2(position + 1)).floor().long()
