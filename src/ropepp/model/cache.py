"""Keys and values of tokens that were read before."""

import torch
from torch import Tensor

from ropepp.errors import InputError

BLOCK = 256  # tokens by which a buffer's capacity is a multiple


class LayerCache:
    """One layer's rotated keys and values, in buffers that are longer than what they hold, at first
    ``capacity`` tokens. A kv head's tokens are neighbours: a query reads memory in its order."""

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self._capacity = capacity
        self._buffer: Tensor | None = None  # keys and values: (2, B, K, capacity, D)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Keys and values, (B, S, K, D) each, views of the buffer; nothing at first."""
        if self._buffer is None:
            return ()
        return self._buffer[:, :, :, : self.length].transpose(2, 3).unbind()

    @torch.no_grad()
    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the next T tokens; returns all keys and values so far, (B, S, K, D) each. No
        gradient reaches those of earlier calls."""
        start, end = self.length, self.length + k_BTKD.shape[1]
        buffer = self._reserve(k_BTKD, end)
        for own, x in zip(buffer, (k_BTKD, v_BTKD), strict=True):
            own[:, :, start:end] = x.transpose(1, 2)
        self.length = end
        k_BSKD, v_BSKD = (k_BTKD, v_BTKD) if start == 0 else self.held
        return k_BSKD, v_BSKD

    def select(self, rows: Tensor) -> None:
        """See `KVCache.select`."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(1, rows)

    def _reserve(self, like_BTKD: Tensor, end: int) -> Tensor:
        """A buffer with room for ``end`` tokens; what is held stays."""
        B, _, K, D = like_BTKD.shape
        old = self._buffer
        if old is not None and old.shape[1] != B:
            raise InputError(f"the cache holds {old.shape[1]} rows; found {B} rows of tokens")
        if old is not None and old.shape[3] >= end:
            return old
        room = -(-max(end, self._capacity) // BLOCK) * BLOCK
        # Not bound to a context of inference, so that any later call may write into it.
        with torch.inference_mode(False):
            self._buffer = like_BTKD.new_empty((2, B, K, room, D))
        if old is not None:
            self._buffer[:, :, :, : self.length] = old[:, :, :, : self.length]
        return self._buffer


class KVCache:
    """What a model has to remember of the tokens that it has read, for any position encoding.

    Keys are stored rotated and once, since real and imaginary heads share them. A token's place in
    the cache says nothing about its position. There is room for ``capacity`` tokens at first.
    """

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]
        self._document_ids: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached tokens in a row (S)."""
        return self.layers[0].length

    @property
    def bytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return sum(x.nbytes for layer in self.layers for x in layer.held)

    def crop(self, length: int) -> None:
        """Forgets what follows the first ``length`` tokens; an `InputError` if there are fewer."""
        if not 0 <= length <= self.length:
            raise InputError(f"crop to {length} tokens of {self.length}; allowed: 0 up to these")
        for layer in self.layers:
            layer.length = length
        if self._document_ids is not None:
            self._document_ids = self._document_ids[:, :length]

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, (new B,) int64: reorders, drops or repeats them."""
        for layer in self.layers:
            layer.select(rows)
        if self._document_ids is not None:
            self._document_ids = self._document_ids.index_select(0, rows)

    def documents(
        self, document_ids_BT: Tensor | None, B: int, T: int
    ) -> tuple[Tensor, Tensor] | None:
        """Document ids (B, T) of the next tokens and (B, S + T) of all; None if none were given.
        Called before the layers, which then append. Rows without ids are one document, 0."""
        before, own = self._document_ids, document_ids_BT
        if own is None:
            if before is None:
                return None
            own = before.new_zeros((B, T))
        if before is None:
            before = own.new_zeros((B, self.length))
        self._document_ids = torch.cat((before, own), dim=1)
        return own, self._document_ids
