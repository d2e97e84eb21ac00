"""Loss and accuracy over an evaluation set, and the loss by position."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ropepp.errors import InputError
from ropepp.model.documents import Documents
from ropepp.model.transformer import Transformer


class Evaluation:
    """Accumulates over the batches of one set, and over all processes."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of losses, targets and hits, one for each position

    def update(self, network: Transformer, batch: dict[str, Any]) -> None:
        """Evaluates ``network`` on a batch, see `ropepp.data.loading.loader.Rows`."""
        ids, targets, positions, _ = inputs = model_inputs(batch)
        nll, hits = network.evaluate(*inputs)
        T = ids.shape[1]
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand_as(ids)
        if self._sums is None:
            self._sums = empty_sums(3, T, device=nll.device)
        place = network.local_part(positions).flatten()
        counted = network.local_part(targets) != network.ignore_index
        for own, x in zip(self._sums, (nll, counted, hits), strict=True):
            own.add_(torch.zeros_like(own).index_add_(0, place, x.flatten().to(own)))

    def compute(self) -> dict[str, Tensor]:
        """Mean loss in nats, its exponential, and accuracy; the same on all processes."""
        losses, counts, hits = (part.sum() for part in self._totals())
        loss = (losses / counts).float()
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": (hits / counts).float()}

    def by_position(self) -> dict[str, list[float]]:
        """Mean loss of the tokens that have about as much context: ``position`` (mean of the bin's
        tokens), ``loss`` in nats and ``count`` of each bin that has tokens.

        A position counts the tokens before it in its document and row. Positions are put together
        in bins that grow with them, four an octave."""
        sums, counts, _ = (part.cpu().double() for part in self._totals())
        position = torch.arange(len(sums), dtype=torch.float64)
        bin_of = context_bins(len(sums))
        places, losses, total = (
            bin_of.bincount(values) for values in (position * counts, sums, counts)
        )
        filled = total > 0
        found = {"position": places / total, "loss": losses / total, "count": total}
        return {key: values[filled].tolist() for key, values in found.items()}

    def _totals(self) -> tuple[Tensor, ...]:
        """Losses, targets and hits of all processes, each (T,)."""
        if self._sums is None:
            raise InputError("the evaluation set has no rows")
        return over_processes(self._sums).unbind()


def on_the_way(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch that is still on the host, ready for ``device``: with its documents found, and for a
    GPU in memory from which it is copied while the host goes on."""
    ids = batch.get("document_ids")
    if isinstance(ids, Tensor):
        batch = {**batch, "document_ids": Documents.from_ids(ids)}
    if device.type != "cuda":
        return batch
    kinds = (Tensor, Documents)
    return {k: x.pin_memory() if isinstance(x, kinds) else x for k, x in batch.items()}


def model_inputs(
    batch: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | Documents | None]:
    """Input ids, targets, positions and documents of a batch, the last two if it has them."""
    return batch["input_ids"], batch["targets"], batch.get("positions"), batch.get("document_ids")


def empty_sums(*shape: int, device: torch.device) -> Tensor:
    """Zeros in float64, in which the order of additions does not show; not every device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(shape, dtype=dtype, device=device)


def over_processes(sums: Tensor) -> Tensor:
    """The sums of all processes, each of which has its own."""
    total = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def context_bins(length: int) -> Tensor:
    """(length,) the bin of each position, four an octave of the tokens up to it."""
    return (4 * torch.arange(1, length + 1, dtype=torch.float64).log2()).floor().long()
