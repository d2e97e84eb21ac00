"""Rows shared by processes (context parallelism): each has some tokens, all have keys and values.

A row is cut into twice as many pieces as there are processes; process r has pieces r and
2 n - 1 - r, so that all have the same number of visible keys to work on under causality. Before
attention the keys and values of all pieces are gathered (as in arXiv 2407.21783, section 3.3.2),
which for EH are half as many bytes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torch.distributed._functional_collectives import all_gather_single_autograd as all_gather
except ImportError:  # its name before torch 2.13
    from torch.distributed._functional_collectives import all_gather_tensor_autograd as all_gather

from ropepp.errors import InputError
from ropepp.model.documents import Documents


class SequenceGroup:
    """The processes that share rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def spans(self, T: int) -> list[tuple[int, int]]:
        """Begin and end of this process's two pieces of a row of T tokens."""
        piece = T // (2 * self.size)
        return [(i * piece, (i + 1) * piece) for i in (self.rank, 2 * self.size - 1 - self.rank)]

    def split(self, x_BT: Tensor) -> Tensor:
        """This process's part (B, T / n, ...) of whole rows (B, T, ...)."""
        return torch.cat([x_BT[:, a:b] for a, b in self.spans(x_BT.shape[1])], dim=1)

    def gather(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Whole rows' keys and values (B, T, K, D) from the parts (B, T / n, K, D); differentiable:
        the gradient of a part is the sum over all processes."""
        K = k_BTKD.shape[2]
        parts = torch.cat((k_BTKD, v_BTKD), dim=2).movedim(1, 0).contiguous()
        whole = all_gather(parts, 0, self.group)
        pieces = whole.unflatten(0, (2 * self.size, -1))
        # Gathered as piece 0, 2n - 1, 1, 2n - 2, ...; here back in the order of the row.
        pieces = torch.cat((pieces[0::2], pieces[1::2].flip(0)))
        rows = pieces.flatten(0, 1).movedim(0, 1)
        return rows[:, :, :K], rows[:, :, K:]

    def boundaries(self, documents: Documents, T: int) -> list[tuple[Documents, Documents]]:
        """For each own piece [a, b), the documents in its queries (B * (b - a)) and in the keys up
        to its end (B * b), from those of whole rows of T tokens."""
        # Found on host and device: a copy would be waited for.
        host, device = (self._boundaries(x, T) for x in (documents.host, documents.boundaries))
        return [
            (Documents(q, q2).for_any_number(), Documents(k, k2).for_any_number())
            for (q, k), (q2, k2) in zip(host, device, strict=True)
        ]

    def _boundaries(self, cu_seqlens: Tensor, T: int) -> list[tuple[Tensor, Tensor]]:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        row = starts // T * T
        starts, ends = starts - row, ends - row
        found = []
        for a, b in self.spans(T):
            last = ends.clamp(max=b)
            queries = (last - starts.clamp(min=a)).clamp(min=0)
            keys = (last - starts).clamp(min=0)
            found.append((_cumulative(queries), _cumulative(keys)))
        return found

    def bytes_gathered(self, B: int, T: int, K: int, D: int, bytes_per_value: int) -> int:
        """What one process receives of keys and values in a layer's forward pass."""
        return 2 * B * (T - T // self.size) * K * D * bytes_per_value


def check_length(T: int, size: int) -> None:
    """Raises an `InputError` if ``size`` processes cannot share rows of T tokens."""
    if T % (2 * size):
        raise InputError(
            f"rows of {T} tokens cannot be shared by {size} processes: the length must be a "
            f"multiple of {2 * size}"
        )


def _cumulative(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
