"""Key-value caches of the readable path: keys in position order, one cache a layer that has keys.

A forward pass *shows* new keys to the cache and reads back what is visible; only `advance`, called
by whoever runs the model, makes them part of it. The same step can so be run again. Buffers are
made at the first use, in the activations' dtype and on their device.

Position order is a choice: a ring buffer holds the same keys in another order, and the order of
keys changes the bits of a softmax. Rings belong to the fast path.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FullCache:
    """Every key and value since the beginning, up to `length` tokens."""

    def __init__(self, num_key_value_heads: int, head_dim: int, length: int) -> None:
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.length = length
        self._past = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Show (batch, kv_heads, tokens, head_dim); return the past followed by them."""
        end = self._past + keys.shape[2]
        assert end <= self.length, f"a cache of {self.length} tokens was shown token {end}"
        if self._held is None:
            shape = (keys.shape[0], self.num_key_value_heads, self.length, self.head_dim)
            self._held = keys.new_zeros(shape), values.new_zeros(shape)
        for held, new in zip(self._held, (keys, values), strict=True):
            held[:, :, self._past : end] = new
        held_keys, held_values = self._held
        return held_keys[:, :, :end], held_values[:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Take in the first `num_tokens` of those last shown; later ones will be overwritten."""
        self._past += num_tokens

    def slots(self, num_tokens: int) -> int:
        """How many tokens are held after `num_tokens`."""
        return num_tokens


class SlidingCache:
    """The last `window - 1` keys and values: with itself, a new token then sees `window`."""

    def __init__(self, num_key_value_heads: int, head_dim: int, window: int) -> None:
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.window = window
        self._held: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Show (batch, kv_heads, tokens, head_dim); return what is held followed by them."""
        if self._held is None:
            self._held = keys[:, :, :0], values[:, :, :0]
        held_keys, held_values = self._held
        self._shown = torch.cat((held_keys, keys), 2), torch.cat((held_values, values), 2)
        return self._shown

    def advance(self, num_tokens: int) -> None:
        """Take in the first `num_tokens` of those last shown, and keep the last `window - 1`."""
        assert self._held is not None, "advance before any forward pass"
        assert self._shown is not None, "advance twice after one forward pass"
        end = self._held[0].shape[2] + num_tokens
        start = max(0, end - (self.window - 1))
        keys, values = self._shown
        # Cloned, or a slice would keep a whole prompt's keys alive.
        self._held = keys[:, :, start:end].clone(), values[:, :, start:end].clone()
        self._shown = None

    def slots(self, num_tokens: int) -> int:
        """How many tokens are held after `num_tokens`."""
        return min(num_tokens, self.window - 1)


class ChunkedCache(SlidingCache):
    """Of a layer that attends within chunks of `window` tokens: the last `window - 1`, as above.

    A chunk's first token sees itself alone, whatever is held: the mask says which are visible.
    """


class SharedKeys:
    """What a layer shows to later ones that have no keys of their own, in one forward pass.

    Such layers have no cache: `Cache.layers` are those of the layers that do.
    """

    def __init__(self) -> None:
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Show all keys and values that the layer saw, (batch, kv_heads, keys, head_dim)."""
        self._shown = keys, values

    def shown(self) -> tuple[Tensor, Tensor]:
        """Those of the last layer that showed any."""
        assert self._shown is not None, "an earlier layer has keys"
        return self._shown


LayerCache = FullCache | SlidingCache


class Cache:
    """The layers' caches, and how many tokens they have taken in together."""

    def __init__(self, batch: int, layers: Iterable[LayerCache]) -> None:
        self.batch = batch
        self.layers = tuple(layers)
        self.length = 0

    def advance(self, num_tokens: int) -> None:
        """Take in the first `num_tokens` of the tokens that the last forward pass showed."""
        for layer in self.layers:
            layer.advance(num_tokens)
        self.length += num_tokens

    def num_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes of keys and values held after `num_tokens` tokens of `itemsize`-byte numbers."""
        return self.batch * sum(
            2 * layer.num_key_value_heads * layer.head_dim * layer.slots(num_tokens) * itemsize
            for layer in self.layers
        )
