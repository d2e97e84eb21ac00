"""Keys and values of tokens that were read before."""

import torch
from torch import Tensor


class LayerCache:
    """One layer's rotated keys and values, (B, S, K, D) each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the next T tokens; returns all keys and values so far."""
        if self.keys is not None and self.values is not None:
            k_BTKD = torch.cat((self.keys, k_BTKD), dim=1)
            v_BTKD = torch.cat((self.values, v_BTKD), dim=1)
        self.keys, self.values = k_BTKD, v_BTKD
        return k_BTKD, v_BTKD


class KVCache:
    """What a model has to remember of the tokens that it has read, for any position encoding.

    Keys are stored rotated and once, since real and imaginary heads share them.

    Args:
        num_layers: Number of blocks of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self._document_ids: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached tokens in a row (S)."""
        keys = self.layers[0].keys
        return 0 if keys is None else keys.shape[1]

    def visible(self, document_ids_BT: Tensor | None, B: int, T: int) -> Tensor | None:
        """Which keys the next T tokens may see by their documents, (B, T, S + T); None is all.

        Called once before the layers, which then append. Rows without ids are one document, 0.
        """
        if document_ids_BT is None and self._document_ids is None:
            return None
        if document_ids_BT is None:
            assert self._document_ids is not None
            document_ids_BT = self._document_ids.new_zeros((B, T))
        before = self._document_ids
        if before is None:
            before = document_ids_BT.new_zeros((B, self.length))
        self._document_ids = torch.cat((before, document_ids_BT), dim=1)
        return document_ids_BT.unsqueeze(2) == self._document_ids.unsqueeze(1)
