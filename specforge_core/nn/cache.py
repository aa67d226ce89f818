"""A cache of keys and values that grows while a draft decodes."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 256  # tokens of room to begin with


class GrowingCache:
    """Keys and values of the tokens so far; the room doubles when it is full."""

    def __init__(self, dim: int) -> None:
        """`dim` is the axis of tokens, from 0 or from the end, in what `extend` is given."""
        self.dim = dim
        self.length = 0  # tokens
        self._keys = torch.empty(0)
        self._values = torch.empty(0)
        self._room = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append tokens, of any shape but for the axis of tokens; return views of all of them."""
        start, count = self.length, keys.shape[self.dim]
        self.length = start + count
        if self.length > self._room or not self._room:  # no tokens have a shape too
            self._room = max(FIRST, 2 * self.length)
            self._keys = self._grown(self._keys, keys, start)
            self._values = self._grown(self._values, values, start)
        self._keys.narrow(self.dim, start, count).copy_(keys)
        self._values.narrow(self.dim, start, count).copy_(values)
        return self._seen(self._keys, self.length), self._seen(self._values, self.length)

    def _grown(self, old: Tensor, like: Tensor, length: int) -> Tensor:
        shape = list(like.shape)
        shape[self.dim] = self._room
        new = like.new_empty(shape)
        if length:
            self._seen(new, length).copy_(self._seen(old, length))
        return new

    def _seen(self, stored: Tensor, length: int) -> Tensor:
        return stored.narrow(self.dim, 0, length)
