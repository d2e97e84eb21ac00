"""Loss and accuracy over an evaluation set, and the loss by position."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from ropepp.model.transformer import Transformer


class Evaluation:
    """Accumulates over the batches of one set, over all processes.

    Args:
        device: Where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loss = MeanMetric().to(device)
        self._accuracy = MeanMetric().to(device)
        self._by_position: tuple[Sums, Sums] | None = None

    def update(self, network: Transformer, batch: dict[str, Tensor]) -> None:
        """Evaluates ``network`` on a batch, see `ropepp.data.loader.Rows`."""
        ids, targets = batch["input_ids"], batch["targets"]
        positions = batch.get("positions")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        nll, hits = network.evaluate(
            ids, targets, batch.get("positions"), batch.get("document_ids")
        )
        counted = network.own(targets) != network.ignore_index
        count = counted.sum()
        for metric, values in ((self._loss, nll), (self._accuracy, hits)):
            metric.update(values.sum() / count.clamp(min=1), weight=count)
        self._add_by_position(network.own(positions), nll, counted, ids.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """Mean loss in nats, its exponential, and accuracy; the same on all processes."""
        loss = self._loss.compute()
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self._accuracy.compute()}

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
        sums, counts = (metric.compute().double().cpu() for metric in self._by_position)
        position = torch.arange(len(sums), dtype=torch.float64)
        of = _bins(len(sums))
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

    def _add_by_position(self, positions: Tensor, nll: Tensor, counted: Tensor, T: int) -> None:
        if self._by_position is None:
            self._by_position = (Sums(T).to(self.device), Sums(T).to(self.device))
        place = positions.flatten()
        for metric, values in zip(self._by_position, (nll, counted), strict=True):
            zeros = torch.zeros(T, dtype=torch.float64, device=values.device)
            metric.update(zeros.index_add(0, place, values.flatten().double()))


class Sums(Metric):
    """Sums of n values each, over batches and processes.

    Args:
        n: How many sums.
    """

    total: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        # In float64 the order of additions does not show.
        self.add_state("total", torch.zeros(n, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds (n,) values."""
        self.total = self.total + values

    def compute(self) -> Tensor:
        """(n,) float64."""
        return self.total


def _bins(length: int) -> Tensor:
    """(length,) the number of each position's bin."""
    position = torch.arange(length, dtype=torch.float64)
    return (4 * torch.log2(position + 1)).floor().long()
