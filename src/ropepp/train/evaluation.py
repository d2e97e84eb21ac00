"""Loss and accuracy over an evaluation set, and the loss by position."""

import torch
from torch import Tensor
from torchmetrics import Metric

from ropepp.errors import InputError
from ropepp.model.transformer import Transformer


class Evaluation:
    """Accumulates over the batches of one set, over all processes.

    Args:
        device: Where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        # In float64 the order of additions does not show; not every device has it.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        self._hits = self._sums(1)
        self._by_position: tuple[Sums, Sums] | None = None  # losses, tokens

    def update(self, network: Transformer, batch: dict[str, Tensor]) -> None:
        """Evaluates ``network`` on a batch, see `ropepp.data.loading.loader.Rows`."""
        ids, positions = batch["input_ids"], batch.get("positions")
        nll, hits = network.evaluate(ids, batch["targets"], positions, batch.get("document_ids"))
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand_as(ids)
        if self._by_position is None:
            self._by_position = (self._sums(T), self._sums(T))
        place = network.own(positions).flatten()
        counted = network.own(batch["targets"]) != network.ignore_index
        for metric, values in zip(self._by_position, (nll, counted), strict=True):
            zeros = torch.zeros(T, dtype=self.dtype, device=self.device)
            metric.update(zeros.index_add(0, place, values.flatten().to(self.dtype)))
        self._hits.update(hits.sum().view(1))

    def compute(self) -> dict[str, Tensor]:
        """Mean loss in nats, its exponential, and accuracy; the same on all processes."""
        if self._by_position is None:
            raise InputError("the evaluation set has no rows")
        losses, counts = (metric.compute().sum() for metric in self._by_position)
        loss = (losses / counts).float()
        accuracy = (self._hits.compute().sum() / counts).float()
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": accuracy}

    def by_position(self) -> dict[str, list[float]]:
        """Mean loss of the tokens that have about as much context.

        A position counts the tokens before it in its document and row. Positions are put together
        in bins that grow with them, four an octave.

        Returns:
            ``position`` (mean of the bin's tokens), ``loss`` in nats and ``count``, each a list
            with an entry for each bin that has tokens.
        """
        if self._by_position is None:
            return {"position": [], "loss": [], "count": []}
        sums, counts = (metric.compute().cpu().double() for metric in self._by_position)
        position = torch.arange(len(sums), dtype=torch.float64)
        of = context_bins(len(sums))
        binned = [
            torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add(0, of, values)
            for values in (position * counts, sums, counts)
        ]
        filled = binned[2] > 0
        total = binned[2][filled]
        return {
            "position": (binned[0][filled] / total).tolist(),
            "loss": (binned[1][filled] / total).tolist(),
            "count": total.tolist(),
        }

    def _sums(self, n: int) -> "Sums":
        return Sums(n, self.dtype).to(self.device)


class Sums(Metric):
    """Sums of n values each, over batches and processes.

    Args:
        n: How many sums.
        dtype: In which they are added up.
    """

    total: Tensor

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(n, dtype=dtype), dist_reduce_fx="sum")

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
